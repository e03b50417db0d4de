"""The benchmarks in small, so that they keep running and their claims keep holding."""

from __future__ import annotations

import statistics

from benchmarks import broadcast, handover, latency


def test_a_broadcast_of_slow_workers_beats_the_sequence():
    rows = broadcast.measure(6, 0.5)
    assert [name for name, _, _ in rows] == ["unload", "reload"]
    for _, serial, parallel in rows:
        assert serial >= 6 * 0.5
        assert serial / parallel >= 4


def test_a_broadcast_to_eight_workers_leaves_within_a_millisecond():
    assert statistics.median(latency.broadcast_skews(8, 100)) < 0.001


def test_status_answers_at_once_while_all_workers_generate(daemon):
    with latency.generating(daemon, 2):
        times = latency.status_times(daemon, 200)
    daemon.client().reload()
    assert statistics.median(times) < 0.010


def test_handing_the_gpus_over_costs_little_beside_the_moves(daemon):
    rounds = handover.measure(daemon, 5, on_gpus=False)
    on_top = [
        each["before_s"] + each["after_s"] - each["unload_s"] - each["reload_s"] for each in rounds
    ]
    starts = [each["gpuctl_start_s"] for each in rounds]
    assert statistics.median(on_top) - statistics.median(starts) < 0.150
