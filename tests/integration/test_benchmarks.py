"""The benchmarks in small, so that they keep running and their claims keep holding."""

from __future__ import annotations

from benchmarks import broadcast


def test_a_broadcast_of_slow_workers_beats_the_sequence():
    rows = broadcast.measure(6, 0.5)
    assert [name for name, _, _ in rows] == ["unload", "reload"]
    for _, serial, parallel in rows:
        assert serial >= 6 * 0.5
        assert serial / parallel >= 4
