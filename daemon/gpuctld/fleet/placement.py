"""Pure policy: which worker takes a job, and whether a model fits beside what is there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpuctl.errors import DeviceMemory
from gpuctl.residency import TIER, Residency, Tier
from gpuctld.fleet.state import FleetState, Job, Step, Worker


def eligible(fleet: FleetState, job: Job) -> list[Worker]:
    """Workers that may run the job once its model is loaded there."""
    allowed = fleet.catalog[job.model].devices if job.model in fleet.catalog else []
    return [
        worker
        for worker in fleet.workers.values()
        if (allowed is None or worker.gpu in allowed) and job.request.gpu in {None, worker.gpu}
    ]


def choose(fleet: FleetState, job: Job, busy: Iterable[int]) -> Worker | None:
    """The idle worker with the model loaded that has not run it for longest."""
    free = [
        worker
        for worker in eligible(fleet, job)
        if worker.idle
        and worker.gpu not in busy
        and worker.state_of(job.model) is Residency.LOADED
        and fleet.lease_on(worker.gpu) is None
    ]
    return min(free, key=lambda worker: worker.holding(job.model).used_at, default=None)


def needed_bytes(fleet: FleetState, step: Step) -> int:
    """Device memory that a step takes; 0 where the model is there already, or stays away.

    What a worker has said of its model includes the model's adapters.
    """
    held = fleet.workers[step.gpu].holding(step.model)
    moves = step.target is Tier.DEVICE and step.change is None
    if not moves or held.state is Residency.LOADED:
        return 0
    known = held.device_bytes or int(fleet.layouts.get(step.model, {}).get("slab_bytes", 0))
    return known or fleet.catalog[step.model].estimated_bytes


def shortage(worker: Worker, need: int, probe: dict[str, Any]) -> DeviceMemory | None:
    """Why ``need`` bytes do not fit, with who holds the memory and what to unload."""
    free = max(0, probe["memory"]["free"] - worker.context_bytes)
    if need <= free:
        return None
    holders = [*_own_models(worker), *(_process(other) for other in probe["foreign"])]
    message = (
        f"gpu {worker.gpu} has {gib(free)} free and {gib(need)} are needed; "
        f"held by {', '.join(holders) or 'others'}"
    )
    return DeviceMemory(message, _remedy(worker, probe["foreign"]))


def _own_models(worker: Worker) -> list[str]:
    return [
        f"{held.model} ({gib(held.device_bytes)})"
        for held in worker.models.values()
        if TIER[held.state] is Tier.DEVICE
    ]


def _process(other: dict[str, Any]) -> str:
    return f"pid {other['pid']} {other['name']} ({gib(other['bytes'])})"


def _remedy(worker: Worker, foreign: list[dict[str, Any]]) -> str:
    loaded = [held for held in worker.models.values() if held.state is Residency.LOADED]
    if loaded:
        largest = max(loaded, key=lambda held: held.device_bytes)
        return f"gpuctl unload {largest.model} --gpu {worker.gpu}"
    if foreign:
        return f"end pid {foreign[0]['pid']}, or wait for it with --wait 60s"
    return "use a smaller model or dtype"


def gib(count: int) -> str:
    """Bytes for people: GiB from one GiB up, else MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
