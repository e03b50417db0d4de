"""Where a model's weights are: tiers, states and the legal steps between them.

A leaf: it imports nothing of gpuctl. The named sets of states follow supervisor's ``states.py``.
"""

from __future__ import annotations

from enum import StrEnum


class Tier(StrEnum):
    """Where the weights are."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Residency(StrEnum):
    """One model on one worker."""

    ABSENT = "absent"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    PARKED = "parked"
    RELOADING = "reloading"


class WorkerState(StrEnum):
    """The one process that owns one device."""

    STARTING = "starting"
    READY = "ready"
    SUSPENDED = "suspended"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"
    QUARANTINED = "quarantined"
    STUCK = "stuck"


class JobState(StrEnum):
    """One generation or edit."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


STABLE = frozenset({Residency.ABSENT, Residency.LOADED, Residency.PARKED})
"""States in which nothing moves; a failed step returns to one of them."""

DOWN = frozenset({WorkerState.FAILED, WorkerState.QUARANTINED, WorkerState.STUCK})
"""Nothing is on its way to bring the worker back."""

JOB_ENDED = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})

TIER: dict[Residency, Tier] = {
    Residency.ABSENT: Tier.DISK,
    Residency.LOADING: Tier.DISK,
    Residency.LOADED: Tier.DEVICE,
    Residency.UNLOADING: Tier.DEVICE,
    Residency.PARKED: Tier.HOST,
    Residency.RELOADING: Tier.HOST,
}
"""The tier that holds a complete copy in each state."""

_STEPS: dict[Residency, frozenset[Residency]] = {
    Residency.ABSENT: frozenset({Residency.LOADING}),
    Residency.LOADING: frozenset({Residency.LOADED, Residency.PARKED, Residency.ABSENT}),
    Residency.LOADED: frozenset({Residency.UNLOADING}),
    Residency.UNLOADING: frozenset({Residency.PARKED, Residency.ABSENT, Residency.LOADED}),
    Residency.PARKED: frozenset({Residency.RELOADING, Residency.UNLOADING}),
    Residency.RELOADING: frozenset({Residency.LOADED, Residency.PARKED, Residency.ABSENT}),
}


def step(state: Residency, to: Residency) -> Residency:
    """Return ``to`` when the step is legal.

    Raises:
        ValueError: the step does not exist.
    """
    if to not in _STEPS[state]:
        raise ValueError(f"no step from {state} to {to}")
    return to
