"""Declared phases: a named arrangement of models, reached with the fewest transfers."""

from __future__ import annotations

from gpuctl.errors import BadRequest
from gpuctl.protocol import Phase
from gpuctl.residency import Residency, Tier
from gpuctld.fleet import moves, operations
from gpuctld.fleet.state import FleetState, Operation, Step, Worker


def enter(fleet: FleetState, request: Phase, now: float) -> None:
    """Unload what the phase does not name, then load what it does.

    Raises:
        BadRequest: no such phase.
        UnknownModel, UnknownGpu, Leased: the phase cannot be entered; nothing has changed.
    """
    if request.name not in fleet.phases:
        known = ", ".join(fleet.phases) or "none; add [phases.NAME] to the configuration"
        raise BadRequest(f"no phase {request.name!r}", f"known: {known}")
    phase = fleet.phases[request.name]
    workers = fleet.select(phase.devices)
    moves.refuse_leased(fleet, workers)
    steps = [step for worker in workers for step in _away(fleet, worker, phase.loaded, request.id)]
    steps += [step for worker in workers for step in _here(fleet, worker, phase.loaded, request.id)]
    deadline = float("inf") if request.timeout_s is None else now + request.timeout_s
    operation = Operation(
        request.id, "phase", steps, now, abort_jobs=request.mode == "abort", deadline=deadline
    )
    operations.begin(fleet, operation)


def _away(fleet: FleetState, worker: Worker, loaded: list[str], operation: str) -> list[Step]:
    return [
        Step(worker.gpu, name, Tier.HOST, operation)
        for name, tier in fleet.promised(worker).items()
        if tier is Tier.DEVICE and name not in loaded
    ]


def _here(fleet: FleetState, worker: Worker, loaded: list[str], operation: str) -> list[Step]:
    return [
        Step(worker.gpu, name, Tier.DEVICE, operation)
        for name in loaded
        if not _stays(fleet, worker, name) and _allowed(fleet, worker, name)
    ]


def _stays(fleet: FleetState, worker: Worker, model: str) -> bool:
    here = worker.state_of(model) is Residency.LOADED
    return here and fleet.promised(worker).get(model) is Tier.DEVICE


def _allowed(fleet: FleetState, worker: Worker, model: str) -> bool:
    devices = fleet.catalog[model].devices
    return devices is None or worker.gpu in devices
