"""What the end of a step changes: residencies, host copies, rows, and what is wanted."""

from __future__ import annotations

from typing import Any

from gpuctl.errors import GpuctlError, WorkerLost
from gpuctl.residency import Residency, Tier, WorkerState
from gpuctld.fleet import report
from gpuctld.fleet.effects import ReleaseCopy
from gpuctld.fleet.state import FleetState, Purpose, Step, StepState, Worker

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


def done(fleet: FleetState, worker: Worker, step: Step, result: dict[str, Any], now: float) -> None:
    """A worker has finished its step."""
    if step.suspend:
        worker.suspend_wanted = True
        end(fleet, step, now, **_row_fields(result))
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
    if not _more_to_come(fleet, step):
        worker.futile_starts = 0
    held.used_at = now
    end(fleet, step, now, **_row_fields(result))
    _release_if_unused(fleet, step.model)


def _more_to_come(fleet: FleetState, step: Step) -> bool:
    """For this worker to load: one model that does is no proof that the next one will."""
    operation = fleet.operation(step.operation)
    left = operation.unfinished if operation is not None else []
    return any(other is not step and other.gpu == step.gpu and other.moves for other in left)


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
    _release_unfinished(fleet, step)
    _release_if_unused(fleet, step.model)


def lost(fleet: FleetState, worker: Worker, step: Step, error: GpuctlError, now: float) -> None:
    """The worker's process ended under a step, or cannot be ended.

    With the process an unload has reached its aim all the same. What was promised back after a
    lease is brought by the next process.
    """
    _release_unfinished(fleet, step)
    freed = step.target is not Tier.DEVICE and worker.state is not WorkerState.STUCK
    if freed and step.origin is not Tier.DISK:
        keep_wanted(fleet, worker, step)
        end(fleet, step, now)
        return
    if _promised(fleet, step):
        step.state = StepState.WAITING
    else:
        end(fleet, step, now, error)


def _promised(fleet: FleetState, step: Step) -> bool:
    operation = fleet.operation(step.operation)
    ends_a_lease = operation is not None and operation.purpose is Purpose.LEASE_END
    return ends_a_lease and step.state is StepState.SENT and not fleet.stopping


def lost_worker(worker: Worker) -> WorkerLost:
    """Why nothing can be had of a worker, and what to do about it."""
    message = f"gpu {worker.gpu} is {worker.state}: {worker.reason}"
    return WorkerLost(message, _REMEDY.get(worker.state, ""))


def keep_wanted(fleet: FleetState, worker: Worker, step: Step) -> None:
    """What an unload leaves to a worker without a process: the host copy, or no context."""
    if step.suspend:
        worker.suspend_wanted = True
    elif step.target is Tier.HOST and step.model in fleet.layouts:
        worker.wanted[step.model] = Tier.HOST
    else:
        worker.wanted.pop(step.model, None)


def end(
    fleet: FleetState, step: Step, now: float, error: GpuctlError | None = None, **result: Any
) -> None:
    """A step is over; its row says how. ``result``: fields of the row."""
    _end_with(fleet, step, now, error.to_map() if error else None, **result)


def _end_with(
    fleet: FleetState, step: Step, now: float, error: dict[str, Any] | None, **result: Any
) -> None:
    if step.state is StepState.ENDED:  # its row was a timeout; the late answer changes no row
        return
    step.state = StepState.ENDED
    step.row = report.row(fleet.workers[step.gpu], step, now, error=error, **result)
    progress(fleet, step, step.row["device_bytes"], step.row["device_bytes"])


def _release_unfinished(fleet: FleetState, step: Step) -> None:
    """A first load that came to nothing leaves no host copy; only one worker writes it."""
    if step.origin is Tier.DISK and not step.suspend and step.model not in fleet.layouts:
        fleet.emit(ReleaseCopy(step.model))


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
