"""Every attack by its name: how often, and within which bounds.

The counts at length are those of an hour or two on two cores; each bound is a promise.
"""

from __future__ import annotations

from tests.chaos import endings, floods, handovers, siege
from tests.chaos.trial import Scenario

_BACK = "a worker's way back"

SCENARIOS: dict[str, Scenario] = {
    "worker-kills": Scenario(
        attack=siege.worker_kills, in_ci=100, at_length=1_000, took=_BACK, took_s=3.0
    ),
    "worker-stops": Scenario(
        attack=siege.worker_stops, in_ci=10, at_length=200, took=_BACK, took_s=3.0
    ),
    "sticky-faults": Scenario(
        attack=siege.sticky_faults, in_ci=20, at_length=500, took=_BACK, took_s=3.0
    ),
    "cuda-faults": Scenario(
        attack=siege.cuda_faults,
        in_ci=0,
        at_length=10,
        took=_BACK,
        took_s=3.0,
        stage=siege.GpuArena,
        needs_gpu=True,
    ),
    "soak": Scenario(attack=siege.soak, in_ci=2, at_length=90, took=_BACK, took_s=3.0),
    "controller-kills": Scenario(
        attack=endings.controller_kills, in_ci=10, at_length=100, took="a new start", took_s=None
    ),
    "controller-stops": Scenario(
        attack=endings.controller_stops,
        in_ci=5,
        at_length=50,
        took="the first answer",
        took_s=1.0,
        status_s=None,  # it waits for as long as the daemon stands still
    ),
    "stops-under-load": Scenario(
        attack=endings.stops_under_load, in_ci=20, at_length=500, took="a stop", took_s=10.0
    ),
    "daemons-at-once": Scenario(
        attack=endings.daemons_at_once, in_ci=20, at_length=500, took="leaving", took_s=3.0
    ),
    "lease-kills": Scenario(
        attack=handovers.lease_kills, in_ci=50, at_length=2_000, took="a lease's end", took_s=1.0
    ),
    "lease-daemon-kills": Scenario(
        attack=handovers.daemon_kills,
        in_ci=10,
        at_length=200,
        took="models back",
        took_s=5.0,  # workers start and read the model anew
        status_s=None,
    ),
    "remote-lease-kills": Scenario(
        attack=handovers.remote_lease_kills,
        in_ci=5,
        at_length=200,
        took="a lease's end",
        took_s=handovers.TTL_S + 1.0,
        stage=handovers.RemoteArena,
    ),
    "malformed": Scenario(
        attack=floods.malformed, in_ci=50_000, at_length=10_000_000, took="", took_s=None
    ),
    "raw-bytes": Scenario(
        attack=floods.raw_bytes, in_ci=5_000, at_length=500_000, took="", took_s=None
    ),
    "bombs": Scenario(attack=floods.bombs, in_ci=100, at_length=1_000, took="", took_s=None),
    "silent-connections": Scenario(
        attack=floods.silent_connections,
        in_ci=1_200,
        at_length=200_000,
        took="letting in again",
        took_s=10.0,
        stage=floods.NarrowArena,
    ),
    "unread-answers": Scenario(
        attack=floods.unread_answers, in_ci=10_000, at_length=1_000_000, took="", took_s=None
    ),
    "deaf-subscribers": Scenario(
        attack=floods.deaf_subscribers, in_ci=500, at_length=5_000, took="", took_s=None
    ),
    "repeats": Scenario(
        attack=floods.repeats, in_ci=5_000, at_length=1_000_000, took="", took_s=None
    ),
}
