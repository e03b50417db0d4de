"""The line of operations: when each starts, what it sends to whom, and when it is over.

Operations are taken in order of arrival. One that shares a worker with an earlier unfinished one
waits for it, so two of them never interleave; others run side by side.
"""

from __future__ import annotations

from typing import Any

import attrs

from gpuctl.errors import Busy, GpuctlError, Timeout
from gpuctl.residency import DOWN, TIER, Residency, Tier, WorkerState
from gpuctld.fleet import outcomes, preflight, report
from gpuctld.fleet.effects import Answer, Send, Spawn
from gpuctld.fleet.state import FleetState, Operation, Purpose, Step, StepState, Task, Worker
from gpuctld.messages import ChangeAdapter, Command, LoadModel, ReloadModel, Suspend, UnloadModel

_UNDERWAY = {
    Tier.DEVICE: {Residency.ABSENT: Residency.LOADING, Residency.PARKED: Residency.RELOADING},
    Tier.HOST: {Residency.LOADED: Residency.UNLOADING},
    Tier.DISK: {Residency.LOADED: Residency.UNLOADING, Residency.PARKED: Residency.UNLOADING},
}


def begin(fleet: FleetState, operation: Operation) -> None:
    """Put a planned operation at the end of the line."""
    fleet.operations.append(operation)


def advance(fleet: FleetState, now: float) -> list[Operation]:
    """Start, send and finish what can be; the operations that ended."""
    ended = []
    for operation in list(fleet.operations):
        if not operation.started and not _blocked(fleet, operation):
            _start(fleet, operation, now)
        if operation.started and preflight.passed(fleet, operation, now):
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
        outcomes.end(
            fleet, step, now, Busy("not tried: another worker failed before (--fail-fast)")
        )
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
            outcomes.end(fleet, step, now, outcomes.lost_worker(worker))
        return
    outcomes.keep_wanted(fleet, worker, step)
    outcomes.end(
        fleet,
        step,
        now,
        outcomes.lost_worker(worker) if worker.state is WorkerState.STUCK else None,
    )


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
    if step.moves and step.target is Tier.DEVICE:
        worker.suspend_wanted = False
    if step.change is not None and not step.change.is_possible(state):
        outcomes.end(fleet, step, now, step.change.refusal(step.model))
        return
    underway = _underway(operation, step, state)
    if underway is None:
        outcomes.end(fleet, step, now)
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
        outcomes.end(fleet, step, now)
    elif loaded:
        outcomes.end(
            fleet, step, now, Busy(f"{', '.join(loaded)} is loaded there", "unload it as well")
        )
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
        Residency.PARKED: limits.unload,  # or taken off
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
            outcomes.end(
                fleet, step, now, Timeout(f"gpu {step.gpu} did not answer in {waited:.1f} s")
            )


def cancel(fleet: FleetState, operation_id: str, error: GpuctlError, now: float) -> bool:
    """Drop the steps of an operation that are not under way; true if there were any."""
    operation = fleet.operation(operation_id)
    if operation is None:
        return False
    waiting = [step for step in operation.unfinished if step.state is StepState.WAITING]
    for step in waiting:
        outcomes.end(fleet, step, now, error)
    operation.started = True
    operation.probes = None
    return bool(waiting)


def restore(fleet: FleetState, worker: Worker, now: float) -> None:
    """Bring a fresh worker's models back to the tier they were in, and suspend it if it was."""
    wanted = {name: tier for name, tier in worker.wanted.items() if name in fleet.catalog}
    suspend = worker.suspend_wanted and Tier.DEVICE not in fleet.promised(worker).values()
    if wanted or suspend:
        _begin_restore(fleet, worker.gpu, wanted, now, suspend=suspend)


def _begin_restore(
    fleet: FleetState, gpu: int, wanted: dict[str, Tier], now: float, *, suspend: bool = False
) -> None:
    fleet.restores += 1
    id_ = f"restore-{fleet.restores}"
    steps = [Step(gpu, name, tier, id_) for name, tier in wanted.items()]
    if suspend:
        steps.append(Step.suspending(gpu, id_))
    begin(fleet, Operation(id_, "restore", steps, now, purpose=Purpose.NOBODY, serial=True))


def _finish(fleet: FleetState, operation: Operation, now: float) -> None:
    fleet.operations.remove(operation)
    if operation.purpose is Purpose.ANSWER:
        fleet.emit(Answer(operation.id, report.moved(operation, now)))
    if operation.name == "restore":
        _park_what_did_not_fit(fleet, operation, now)


def _park_what_did_not_fit(fleet: FleetState, operation: Operation, now: float) -> None:
    """A model that finds no room on its device comes back parked, with the reason on record.

    Not so where the worker has ended meanwhile: the next one tries again.
    """
    for step in operation.steps:
        worker = fleet.workers[step.gpu]
        here = worker.up and step.model in fleet.layouts
        if step.failed and step.row and step.target is Tier.DEVICE and here:
            worker.wanted[step.model] = Tier.HOST
            worker.holding(step.model).error = step.row["error"]
            _begin_restore(fleet, step.gpu, {step.model: Tier.HOST}, now)
