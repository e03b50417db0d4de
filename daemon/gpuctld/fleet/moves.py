"""What requests to load, unload and reload ask of which workers: the steps of an operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpuctl.errors import BadRequest, Busy, Leased
from gpuctl.protocol import Load, LoraAdd, LoraRemove, Reload, Unload
from gpuctl.residency import Residency, Tier
from gpuctld.fleet import operations, report
from gpuctld.fleet.state import AdapterChange, FleetState, Lease, Operation, Step, Worker


def load(fleet: FleetState, request: Load, now: float) -> None:
    """Accept a load.

    Raises:
        UnknownModel, UnknownGpu, Leased: and nothing has changed.
    """
    model = fleet.catalog[request.model]
    workers = fleet.select(request.gpus if request.gpus is not None else model.devices)
    forced = _forced(fleet, workers, request, now)
    parked = all(worker.state_of(model.name) is Residency.PARKED for worker in workers)
    steps = [Step(worker.gpu, model.name, Tier.DEVICE, request.id) for worker in workers]
    serial = not parked if request.serial is None else request.serial
    operations.begin(
        fleet,
        Operation(
            request.id,
            "load",
            steps,
            now,
            serial=serial,
            fail_fast=request.fail_fast,
            verify=request.verify or model.verify,
            fanout=request.fanout,
            wait_until=now + request.wait_s,
            deadline=_deadline(request.timeout_s, now),
            forced=forced,
        ),
    )


def unload(fleet: FleetState, request: Unload, now: float) -> None:
    """Accept an unload.

    Raises:
        UnknownModel, UnknownGpu: and nothing has changed.
    """
    target = Tier(request.to)
    workers = fleet.select(request.gpus)
    steps = unload_steps(fleet, workers, request.id, target, _named(fleet, request.model))
    if request.suspend:
        steps += suspend_steps(workers, request.id)
    operations.begin(
        fleet,
        Operation(
            request.id,
            "unload",
            steps,
            now,
            abort_jobs=request.mode == "abort",
            deadline=_deadline(request.timeout_s, now),
        ),
    )


def reload(fleet: FleetState, request: Reload, now: float) -> None:
    """Accept a reload of what is parked.

    Raises:
        UnknownModel, UnknownGpu, Leased: and nothing has changed.
        Busy: the named model is nowhere in host memory.
    """
    model = _named(fleet, request.model)
    workers = fleet.select(request.gpus)
    forced = _forced(fleet, workers, request, now)
    steps = reload_steps(fleet, workers, request.id, model)
    if model is not None and not steps:
        raise Busy(f"{model} is not in host memory", f"gpuctl load {model}")
    verify = request.verify or any(fleet.catalog[step.model].verify for step in steps)
    operations.begin(
        fleet,
        Operation(
            request.id,
            "reload",
            steps,
            now,
            serial=request.serial,
            verify=verify,
            fanout=request.fanout,
            wait_until=now + request.wait_s,
            deadline=_deadline(request.timeout_s, now),
            forced=forced,
        ),
    )


def change_adapter(fleet: FleetState, request: LoraAdd | LoraRemove, now: float) -> None:
    """Accept a change of an adapter on every worker that has the model where it can be made.

    Raises:
        UnknownModel, BadRequest: no such model or adapter.
        Busy: the model is in no such place.
    """
    change = _adapter_change(fleet, request)
    workers = [
        worker
        for worker, held in fleet.holders(request.model)
        if change.is_possible(held.state) or worker.task is not None
    ]
    if not workers:
        raise change.refusal(request.model)
    steps = [
        Step(worker.gpu, request.model, Tier.DEVICE, request.id, change=change)
        for worker in workers
    ]
    operations.begin(fleet, Operation(request.id, request.op, steps, now))


def _adapter_change(fleet: FleetState, request: LoraAdd | LoraRemove) -> AdapterChange:
    configured = fleet.catalog[request.model].adapters
    if request.adapter not in configured:
        known = ", ".join(configured) or "none; add [models.NAME.adapters.ADAPTER]"
        raise BadRequest(f"{request.model} has no adapter {request.adapter!r}", f"known: {known}")
    if isinstance(request, LoraRemove):
        return AdapterChange(request.adapter)
    return AdapterChange(request.adapter, configured[request.adapter].path, request.scale)


def unload_steps(
    fleet: FleetState,
    workers: Sequence[Worker],
    operation: str,
    target: Tier,
    model: str | None = None,
) -> list[Step]:
    """One step per worker and model; of all models, those that are or shall be there."""
    return [
        Step(worker.gpu, name, target, operation)
        for worker in workers
        for name in ([model] if model is not None else _present(fleet, worker))
    ]


def suspend_steps(workers: Sequence[Worker], operation: str) -> list[Step]:
    """One step per worker, to come after those that unload its models."""
    return [Step.suspending(worker.gpu, operation) for worker in workers]


def reload_steps(
    fleet: FleetState, workers: Sequence[Worker], operation: str, model: str | None
) -> list[Step]:
    """One step per worker where the model is, or shall be, in host memory or on the device."""
    return [
        Step(worker.gpu, name, Tier.DEVICE, operation)
        for worker in workers
        for name in _present(fleet, worker)
        if model in {None, name}
    ]


def _present(fleet: FleetState, worker: Worker) -> list[str]:
    """Models that are there, shall be, or will be when what was accepted before is done."""
    there = [name for name, held in worker.models.items() if held.state is not Residency.ABSENT]
    coming = [name for name, tier in fleet.promised(worker).items() if tier is not Tier.DISK]
    return list(dict.fromkeys([*there, *worker.wanted, *coming]))


def _named(fleet: FleetState, model: str | None) -> str | None:
    return None if model is None else fleet.catalog[model].name


def _deadline(timeout_s: float | None, now: float) -> float:
    return float("inf") if timeout_s is None else now + timeout_s


def _forced(
    fleet: FleetState, workers: Sequence[Worker], request: Load | Reload, now: float
) -> list[dict[str, Any]]:
    """Whose the GPUs are, where the request asks for them all the same.

    Raises:
        Leased: it does not.
    """
    if not request.force:
        refuse_leased(fleet, workers)
    return [report.lease(each, now) for each in _leases_on(fleet, workers)]


def refuse_leased(fleet: FleetState, workers: Sequence[Worker]) -> None:
    """Nobody else moves models onto GPUs that are handed to another program.

    Raises:
        Leased: with the holder.
    """
    for lease in _leases_on(fleet, workers):
        gpu = min(set(lease.gpus) & {worker.gpu for worker in workers})
        hint = f"wait for it, or gpuctl lease release {lease.id}"
        raise Leased(f"gpu {gpu} is leased to {lease.whose}", hint)


def _leases_on(fleet: FleetState, workers: Sequence[Worker]) -> list[Lease]:
    """Leases in force; behind one that is ending an operation stands in line instead."""
    found = (fleet.lease_on(worker.gpu) for worker in workers)
    return list({each.id: each for each in found if each and not each.ending}.values())
