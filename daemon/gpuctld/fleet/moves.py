"""Load, unload and reload: planning steps, their order, and what their answers change.

Operations are taken in order of arrival. One that shares a worker with an earlier unfinished one
waits for it, so two of them never interleave; others run side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from gpuctl.errors import BadRequest, Busy, DeviceMemory, GpuctlError, Leased, Timeout, WorkerLost
from gpuctl.protocol import Load, LoraAdd, LoraRemove, Reload, Unload
from gpuctl.residency import DOWN, TIER, Residency, Tier, WorkerState
from gpuctld.fleet import placement, report
from gpuctld.fleet.effects import Answer, ReleaseCopy, Send, Spawn
from gpuctld.fleet.state import (
    AdapterChange,
    FleetState,
    Operation,
    Purpose,
    Step,
    StepState,
    Task,
    Worker,
)
from gpuctld.messages import (
    ChangeAdapter,
    Command,
    LoadModel,
    Probe,
    ReloadModel,
    Suspend,
    UnloadModel,
)

REPROBE_S = 0.1

_UNDERWAY = {
    Tier.DEVICE: {Residency.ABSENT: Residency.LOADING, Residency.PARKED: Residency.RELOADING},
    Tier.HOST: {Residency.LOADED: Residency.UNLOADING},
    Tier.DISK: {Residency.LOADED: Residency.UNLOADING, Residency.PARKED: Residency.UNLOADING},
}
_IN_ROWS = frozenset(
    ("freed_bytes", "residual_bytes", "path", "foreign", "device_bytes", "host_bytes", "adapters")
)
_REMEDY = {
    WorkerState.FAILED: "gpuctl load or reload tries again",
    WorkerState.QUARANTINED: "repair the device, then restart gpuctld",
    WorkerState.STUCK: "a worker is started there when that process has ended",
}

_ARRIVED = {
    Tier.DEVICE: Residency.LOADED,
    Tier.HOST: Residency.PARKED,
    Tier.DISK: Residency.ABSENT,
}


# --- accepting ------------------------------------------------------------------------------


def load(fleet: FleetState, request: Load, now: float) -> None:
    """Accept a load.

    Raises:
        UnknownModel, UnknownGpu, Leased: and nothing has changed.
    """
    model = fleet.catalog[request.model]
    workers = fleet.select(request.gpus if request.gpus is not None else model.devices)
    refuse_leased(fleet, workers, force=request.force)
    parked = all(worker.state_of(model.name) is Residency.PARKED for worker in workers)
    steps = [Step(worker.gpu, model.name, Tier.DEVICE, request.id) for worker in workers]
    serial = not parked if request.serial is None else request.serial
    begin(
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
        ),
    )


def unload(fleet: FleetState, request: Unload, now: float) -> None:
    """Accept an unload.

    Raises:
        UnknownModel, UnknownGpu: and nothing has changed.
    """
    target = Tier(request.to)
    workers = fleet.select(request.gpus)
    steps = unload_steps(workers, request.id, target, _named(fleet, request.model))
    if request.suspend:
        steps += suspend_steps(workers, request.id)
    begin(
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
    refuse_leased(fleet, workers, force=request.force)
    steps = reload_steps(workers, request.id, model)
    if model is not None and not steps:
        raise Busy(f"{model} is not in host memory", f"gpuctl load {model}")
    verify = request.verify or any(fleet.catalog[step.model].verify for step in steps)
    begin(
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
        ),
    )


def change_adapter(fleet: FleetState, request: LoraAdd | LoraRemove, now: float) -> None:
    """Accept a change of an adapter on every worker that has the model loaded.

    Raises:
        UnknownModel, BadRequest: no such model or adapter.
        Busy: the model is loaded nowhere.
    """
    change = _adapter_change(fleet, request)
    workers = [
        worker
        for worker, held in fleet.holders(request.model)
        if held.state is Residency.LOADED or worker.task is not None
    ]
    if not workers:
        raise Busy(f"{request.model} is not loaded", f"gpuctl load {request.model}")
    steps = [
        Step(worker.gpu, request.model, Tier.DEVICE, request.id, change=change)
        for worker in workers
    ]
    begin(fleet, Operation(request.id, request.op, steps, now))


def _adapter_change(fleet: FleetState, request: LoraAdd | LoraRemove) -> AdapterChange:
    configured = fleet.catalog[request.model].adapters
    if request.adapter not in configured:
        known = ", ".join(configured) or "none; add [models.NAME.adapters.ADAPTER]"
        raise BadRequest(f"{request.model} has no adapter {request.adapter!r}", f"known: {known}")
    if isinstance(request, LoraRemove):
        return AdapterChange(request.adapter)
    return AdapterChange(request.adapter, configured[request.adapter].path, request.scale)


def begin(fleet: FleetState, operation: Operation) -> None:
    """Put a planned operation at the end of the line."""
    fleet.operations.append(operation)


def unload_steps(
    workers: Sequence[Worker], operation: str, target: Tier, model: str | None
) -> list[Step]:
    """One step per worker and model; of all models, those that are or shall be there."""
    return [
        Step(worker.gpu, name, target, operation)
        for worker in workers
        for name in ([model] if model is not None else _present(worker))
    ]


def suspend_steps(workers: Sequence[Worker], operation: str) -> list[Step]:
    """One step per worker, to come after those that unload its models."""
    return [Step(worker.gpu, "", Tier.HOST, operation, suspend=True) for worker in workers]


def reload_steps(workers: Sequence[Worker], operation: str, model: str | None) -> list[Step]:
    """One step per worker where the model is, or shall be, in host memory or on the device."""
    return [
        Step(worker.gpu, name, Tier.DEVICE, operation)
        for worker in workers
        for name in _present(worker)
        if model in {None, name}
    ]


def _present(worker: Worker) -> list[str]:
    there = [name for name, held in worker.models.items() if held.state is not Residency.ABSENT]
    return list(dict.fromkeys([*there, *worker.wanted]))


def _named(fleet: FleetState, model: str | None) -> str | None:
    return None if model is None else fleet.catalog[model].name


def _deadline(timeout_s: float | None, now: float) -> float:
    return float("inf") if timeout_s is None else now + timeout_s


def refuse_leased(fleet: FleetState, workers: Sequence[Worker], *, force: bool) -> None:
    """Nobody else moves models onto GPUs that are handed to another program.

    Raises:
        Leased: with the holder.
    """
    for worker in workers:
        lease = fleet.lease_on(worker.gpu)
        if lease is not None and not force:
            raise Leased(
                f"gpu {worker.gpu} is leased to pid {lease.holder.pid} {lease.command}".rstrip(),
                f"wait for it, or gpuctl lease release {lease.id}",
            )


# --- advancing ------------------------------------------------------------------------------


def advance(fleet: FleetState, now: float) -> list[Operation]:
    """Start, send and finish what can be; the operations that ended."""
    ended = []
    for operation in list(fleet.operations):
        if not operation.started and not _blocked(fleet, operation):
            _start(fleet, operation, now)
        if operation.started and _preflight(fleet, operation, now):
            _send_due(fleet, operation, now)
        if operation.started and not operation.unfinished:
            _finish(fleet, operation, now)
            ended.append(operation)
    return ended


def _blocked(fleet: FleetState, operation: Operation) -> bool:
    earlier = fleet.operations[: fleet.operations.index(operation)]
    return any(operation.gpus & other.gpus for other in earlier)


def _start(fleet: FleetState, operation: Operation, now: float) -> None:
    operation.started = True
    for step in operation.steps:
        worker = fleet.workers[step.gpu]
        if step.target is Tier.DEVICE and worker.state is WorkerState.FAILED:
            _try_again(fleet, worker, now)
    if any(step.target is Tier.DEVICE for step in operation.steps):
        operation.probes = {}


def _try_again(fleet: FleetState, worker: Worker, now: float) -> None:
    """An explicit load or reload gives a failed worker a fresh restart budget."""
    worker.futile_starts = 0
    worker.deaths = 0
    fleet.set_worker(worker, WorkerState.STARTING, "asked for again", now)
    fleet.emit(Spawn(worker.gpu))


def _preflight(fleet: FleetState, operation: Operation, now: float) -> bool:
    """Check all GPUs before the first transfer, so that a move is all or none.

    True when steps may be sent. Workers that are not ready are probed when they are.
    """
    if operation.probes is None:
        return True
    asked = {step.gpu for step in operation.unfinished if _takes_memory(fleet, step)}
    for gpu in sorted(asked - operation.probes.keys()):
        if fleet.workers[gpu].up and now >= operation.probe_at:
            operation.probes[gpu] = None
            fleet.emit(Send(gpu, Probe(task=operation.id)))
    if any(operation.probes.get(gpu) is None for gpu in asked):
        return False
    return _all_fit(fleet, operation, asked, now)


def _takes_memory(fleet: FleetState, step: Step) -> bool:
    """On a worker that is down it takes nothing: the step will fail by itself."""
    down = fleet.workers[step.gpu].state in DOWN
    return not down and placement.needed_bytes(fleet, step) > 0


def _all_fit(fleet: FleetState, operation: Operation, gpus: set[int], now: float) -> bool:
    short = {gpu: error for gpu in gpus if (error := _shortage(fleet, operation, gpu)) is not None}
    if not short:
        operation.probes = None
        return True
    if now < operation.wait_until:
        operation.probes = {}
        operation.probe_at = now + REPROBE_S
        return False
    first = next(iter(short.values()))
    for step in operation.unfinished:
        _end(fleet, step, now, short.get(step.gpu, _held_back(first)))
    return False


def _shortage(fleet: FleetState, operation: Operation, gpu: int) -> DeviceMemory | None:
    steps = [step for step in operation.unfinished if step.gpu == gpu]
    need = sum(placement.needed_bytes(fleet, step) for step in steps)
    probe = (operation.probes or {})[gpu]
    return placement.shortage(fleet.workers[gpu], need, probe) if probe else None


def _held_back(error: DeviceMemory) -> DeviceMemory:
    return DeviceMemory(f"held back: {error.message}", error.hint)


def probed(fleet: FleetState, operation_id: str, gpu: int, probe: dict[str, Any]) -> None:
    """A worker has sampled its device."""
    operation = fleet.operation(operation_id)
    if operation is not None and operation.probes is not None:
        operation.probes[gpu] = probe


def forget_probes(fleet: FleetState, gpu: int) -> None:
    """A worker has died and will not answer: ask the next one."""
    for operation in fleet.operations:
        if operation.probes is not None:
            operation.probes.pop(gpu, None)


def _send_due(fleet: FleetState, operation: Operation, now: float) -> None:
    fanout = _fanout_plans(fleet, operation)
    for step in operation.unfinished:
        if step.state is StepState.WAITING:
            _send_if_due(fleet, operation, step, fanout.get(step.gpu), now)
        if operation.serial and step.state is not StepState.ENDED:
            return


def _send_if_due(
    fleet: FleetState, operation: Operation, step: Step, fanout: dict[str, Any] | None, now: float
) -> None:
    worker = fleet.workers[step.gpu]
    if operation.fail_fast and any(other.failed for other in operation.steps):
        _end(fleet, step, now, Busy("not tried: another worker failed before (--fail-fast)"))
    elif not _has_process(worker):
        _end_without_process(fleet, worker, step, now)
    elif worker.idle and step.suspend:
        _send_suspend(fleet, worker, step, now)
    elif worker.idle and not _someone_reads_the_disk(fleet, step):
        _send(fleet, operation, worker, step, fanout, now)


def _has_process(worker: Worker) -> bool:
    return worker.up or worker.state is WorkerState.STARTING


def _end_without_process(fleet: FleetState, worker: Worker, step: Step, now: float) -> None:
    """A dead worker's GPU is free already; what it shall have when it is back is on record.

    That of a process which does not end is not free.
    """
    if step.target is Tier.DEVICE:
        if worker.state in DOWN:
            _end(fleet, step, now, lost_worker(worker))
        return
    _keep_wanted(fleet, worker, step)
    _end(fleet, step, now, lost_worker(worker) if worker.state is WorkerState.STUCK else None)


def lost_worker(worker: Worker) -> WorkerLost:
    """Why nothing can be had of a worker, and what to do about it."""
    message = f"gpu {worker.gpu} is {worker.state}: {worker.reason}"
    return WorkerLost(message, _REMEDY.get(worker.state, ""))


def _keep_wanted(fleet: FleetState, worker: Worker, step: Step) -> None:
    """What an unload leaves for a worker without a process: the host copy, if it stays."""
    if step.target is Tier.HOST and step.model in fleet.layouts:
        worker.wanted[step.model] = Tier.HOST
    else:
        worker.wanted.pop(step.model, None)


def _someone_reads_the_disk(fleet: FleetState, step: Step) -> bool:
    """Weight files are read once per host: others wait and then attach to the host copy."""
    if step.model in fleet.layouts:
        return False
    running = (worker.task.step for worker in fleet.workers.values() if worker.task)
    return any(
        other is not None and other.model == step.model and other.origin is Tier.DISK
        for other in running
    )


def _send(
    fleet: FleetState,
    operation: Operation,
    worker: Worker,
    step: Step,
    fanout: dict[str, Any] | None,
    now: float,
) -> None:
    state = worker.state_of(step.model)
    step.origin = TIER[state]
    step.sent_at = now
    underway = _underway(operation, step, state)
    if underway is None:
        _end(fleet, step, now)
        return
    command = _command(fleet, operation, step, state, fanout)
    fleet.set_residency(worker, step.model, underway)
    step.state = StepState.SENT
    worker.task = Task(step.task, now + _limit(fleet, underway), step=step)
    fleet.emit(Send(worker.gpu, command))


def _send_suspend(fleet: FleetState, worker: Worker, step: Step, now: float) -> None:
    """Only an empty device is given back: the driver would copy what is left to host memory."""
    suspended = worker.state is WorkerState.SUSPENDED
    step.origin = Tier.HOST if suspended else Tier.DEVICE
    step.sent_at = now
    loaded = [held.model for held in worker.models.values() if held.state is Residency.LOADED]
    if suspended:
        _end(fleet, step, now)
    elif loaded:
        _end(fleet, step, now, Busy(f"{', '.join(loaded)} is loaded there", "unload it as well"))
    else:
        step.state = StepState.SENT
        worker.task = Task(step.task, now + fleet.config.deadlines.unload, step=step)
        fleet.emit(Send(worker.gpu, Suspend(task=step.task)))


def _underway(operation: Operation, step: Step, state: Residency) -> Residency | None:
    """The state during the move; ``None`` where there is nothing to do.

    Only a restore brings an absent model up to host memory, and it never moves one that is there.
    """
    if step.change is not None:
        return state
    if operation.name == "restore":
        return Residency.LOADING if state is Residency.ABSENT else None
    return _UNDERWAY[step.target].get(state)


def _command(
    fleet: FleetState,
    operation: Operation,
    step: Step,
    state: Residency,
    fanout: dict[str, Any] | None,
) -> Command:
    if step.change is not None:
        return ChangeAdapter(task=step.task, model=step.model, **attrs.asdict(step.change))
    if step.target is not Tier.DEVICE and state is not Residency.ABSENT:
        return UnloadModel(task=step.task, model=step.model, tier=str(step.target))
    if state is Residency.PARKED:
        return ReloadModel(task=step.task, model=step.model, verify=operation.verify, fanout=fanout)
    worker, model = fleet.workers[step.gpu], fleet.catalog[step.model]
    return LoadModel(
        task=step.task,
        source=model.source(),
        layout=fleet.layouts.get(step.model),
        tier=str(step.target),
        adapters=_adapters(fleet, worker, step.model),
        verify=operation.verify,
    )


def _adapters(fleet: FleetState, worker: Worker, model: str) -> list[dict[str, Any]]:
    """Those it had before its worker was replaced; at a first load those that are preloaded."""
    configured = fleet.catalog[model].adapters
    before = worker.holding(model).adapters
    wanted = {each["name"]: each["scale"] for each in before} or {
        name: adapter.scale for name, adapter in configured.items() if adapter.preload
    }
    return [
        {"name": name, "path": configured[name].path, "scale": scale}
        for name, scale in wanted.items()
        if name in configured
    ]


def _limit(fleet: FleetState, underway: Residency) -> float:
    limits = fleet.config.deadlines
    return {
        Residency.LOADED: limits.load,  # an adapter is read from disk
        Residency.LOADING: limits.load,
        Residency.UNLOADING: limits.unload,
        Residency.RELOADING: limits.reload,
    }[underway]


def _fanout_plans(fleet: FleetState, operation: Operation) -> dict[int, dict[str, Any]]:
    """Ranks for workers that reload the same model in one broadcast, all of them idle."""
    waiting = [step for step in operation.unfinished if step.state is StepState.WAITING]
    together = [step.gpu for step in waiting if _can_share(fleet, step)]
    models = {step.model for step in waiting}
    enough = len(together) > 1 and len(together) == len(waiting) == len(operation.steps)
    if not enough or len(models) > 1 or operation.serial or not operation.fanout:
        return {}
    return {
        gpu: {"rank": rank, "world": len(together), "gpus": together, "token": operation.id}
        for rank, gpu in enumerate(together)
    }


def _can_share(fleet: FleetState, step: Step) -> bool:
    worker = fleet.workers[step.gpu]
    parked = worker.state_of(step.model) is Residency.PARKED
    return worker.idle and parked and worker.device.is_cuda


# --- answers --------------------------------------------------------------------------------


def done(fleet: FleetState, worker: Worker, step: Step, result: dict[str, Any], now: float) -> None:
    """A worker has finished its step."""
    if step.suspend:
        _end(fleet, step, now, **_row_fields(result))
        return
    held = worker.holding(step.model)
    layout = result.pop("layout", None)
    if layout is not None:
        fleet.layouts[step.model] = layout
    elif held.state is Residency.LOADING and step.model not in fleet.layouts:
        fleet.emit(ReleaseCopy(step.model))
    for name in ("device_bytes", "host_bytes", "moves_by", "moves_by_reason", "adapters"):
        if name in result:
            setattr(held, name, result[name])
    held.error = None
    if step.change is None:
        fleet.set_residency(worker, step.model, _ARRIVED[step.target])
    _record_wanted(worker, step)
    worker.futile_starts = 0
    held.used_at = now
    _end(fleet, step, now, **_row_fields(result))
    _release_if_unused(fleet, step.model)


def _row_fields(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in _IN_ROWS if name in result}


def _record_wanted(worker: Worker, step: Step) -> None:
    if step.target is Tier.DISK:
        worker.wanted.pop(step.model, None)
    else:
        worker.wanted[step.model] = step.target


def failed(
    fleet: FleetState, worker: Worker, step: Step, error: dict[str, Any], now: float
) -> None:
    """A step failed; the model is again where it was."""
    if step.suspend:
        _end_with(fleet, step, now, error)
        return
    held = worker.holding(step.model)
    back = {Tier.DISK: Residency.ABSENT, Tier.HOST: Residency.PARKED, Tier.DEVICE: Residency.LOADED}
    fleet.set_residency(worker, step.model, back[step.origin])
    held.error = error
    _end_with(fleet, step, now, error)
    _release_if_unused(fleet, step.model)


def lost(fleet: FleetState, worker: Worker, step: Step, error: GpuctlError, now: float) -> None:
    """The worker's process ended under a step. An unload has reached its aim all the same."""
    if step.target is Tier.DEVICE or step.origin is Tier.DISK:
        _end(fleet, step, now, error)
        return
    _keep_wanted(fleet, worker, step)
    _end(fleet, step, now)


def _end(
    fleet: FleetState, step: Step, now: float, error: GpuctlError | None = None, **result: Any
) -> None:
    _end_with(fleet, step, now, error.to_map() if error else None, **result)


def _end_with(
    fleet: FleetState, step: Step, now: float, error: dict[str, Any] | None, **result: Any
) -> None:
    if step.state is StepState.ENDED:  # its row was a timeout; the late answer changes no row
        return
    step.state = StepState.ENDED
    step.row = report.row(fleet.workers[step.gpu], step, now, error=error, **result)
    progress(fleet, step, step.row["device_bytes"], step.row["device_bytes"])


def _release_if_unused(fleet: FleetState, model: str) -> None:
    wanted = any(model in worker.wanted for worker in fleet.workers.values())
    if model in fleet.layouts and not wanted and not any(fleet.holders(model)):
        del fleet.layouts[model]
        fleet.emit(ReleaseCopy(model))


def progress(fleet: FleetState, step: Step, done_bytes: int, total: int) -> None:
    """Bytes of a transfer."""
    step.done = done_bytes / total if total else 0.0
    operation = fleet.operation(step.operation)
    fleet.publish(
        "move",
        step.operation,
        op=operation.name if operation else "",
        gpu=step.gpu,
        model=step.model,
        state=report.state_after(fleet.workers[step.gpu], step),
        done=done_bytes,
        total=total,
    )


def expire(fleet: FleetState, now: float) -> None:
    """Rows of steps that took longer than their client allows; late answers still count."""
    for operation in fleet.operations:
        if now < operation.deadline:
            continue
        operation.started = True
        for step in operation.unfinished:
            worker = fleet.workers[step.gpu]
            if step.state is StepState.SENT and step.target is not Tier.DEVICE and worker.task:
                worker.task.deadline = min(worker.task.deadline, now)
            waited = now - operation.accepted_at
            _end(fleet, step, now, Timeout(f"gpu {step.gpu} did not answer in {waited:.1f} s"))


def cancel(fleet: FleetState, operation_id: str, error: GpuctlError, now: float) -> bool:
    """Drop the steps of an operation that are not under way; true if there were any."""
    operation = fleet.operation(operation_id)
    if operation is None:
        return False
    waiting = [step for step in operation.unfinished if step.state is StepState.WAITING]
    for step in waiting:
        _end(fleet, step, now, error)
    operation.started = True
    operation.probes = None
    return bool(waiting)


def restore(fleet: FleetState, worker: Worker, now: float) -> None:
    """Bring a fresh worker's models back to the tier they were in."""
    steps = [(name, tier) for name, tier in worker.wanted.items() if name in fleet.catalog]
    if steps:
        _begin_restore(fleet, worker.gpu, steps, now)


def _begin_restore(
    fleet: FleetState, gpu: int, wanted: Sequence[tuple[str, Tier]], now: float
) -> None:
    fleet.restores += 1
    id_ = f"restore-{fleet.restores}"
    steps = [Step(gpu, name, tier, id_) for name, tier in wanted]
    begin(fleet, Operation(id_, "restore", steps, now, purpose=Purpose.NOBODY, serial=True))


def _finish(fleet: FleetState, operation: Operation, now: float) -> None:
    fleet.operations.remove(operation)
    if operation.purpose is Purpose.ANSWER:
        fleet.emit(Answer(operation.id, report.moved(operation, now)))
    if operation.name == "restore":
        _park_what_did_not_fit(fleet, operation, now)


def _park_what_did_not_fit(fleet: FleetState, operation: Operation, now: float) -> None:
    """A model that finds no room on its device comes back parked, with the reason on record."""
    for step in operation.steps:
        if step.failed and step.row and step.target is Tier.DEVICE and step.model in fleet.layouts:
            worker = fleet.workers[step.gpu]
            worker.wanted[step.model] = Tier.HOST
            worker.holding(step.model).error = step.row["error"]
            _begin_restore(fleet, step.gpu, [(step.model, Tier.HOST)], now)
