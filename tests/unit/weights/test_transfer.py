"""Spans and shares cover every byte exactly once, and copies never straddle two pinned pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpuctld.weights.transfer import cuts


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 700))
def test_cuts_cover_a_span_and_never_cross_a_multiple(start, length, piece):
    stop = start + length
    pieces = list(cuts(start, stop, piece))
    assert sum(size for _, size in pieces) == length
    assert [at for at, _ in pieces[1:]] == [at + size for at, size in pieces[:-1]]
    assert all(at // piece == (at + size - 1) // piece for at, size in pieces)
