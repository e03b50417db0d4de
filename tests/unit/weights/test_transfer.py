"""Spans and shares cover every byte exactly once, and copies never straddle two pinned pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuctld.weights.fanout import shares
from gpuctld.weights.transfer import cuts


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 700))
def test_cuts_cover_a_span_and_never_cross_a_multiple(start, length, piece):
    stop = start + length
    pieces = list(cuts(start, stop, piece))
    assert sum(size for _, size in pieces) == length
    assert [at for at, _ in pieces[1:]] == [at + size for at, size in pieces[:-1]]
    assert all(at // piece == (at + size - 1) // piece for at, size in pieces)


@pytest.mark.parametrize("world", [1, 2, 3, 6, 8])
def test_shares_cover_every_byte_once(world):
    for size in (1, 512, 65_536, 100_000_000):
        spans = shares(size, world)
        assert spans[0][0] == 0
        assert spans[-1][1] == size
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
