"""Watching the workers: hello, beats, deadlines, deaths and the way back."""

from __future__ import annotations

import signal

from gpuctl.errors import GpuctlError, GpuFault, WorkerLost
from gpuctl.residency import DOWN, Residency, Tier, WorkerState
from gpuctld.fleet import jobs, operations, outcomes, preflight
from gpuctld.fleet.effects import Send, Signal, Spawn
from gpuctld.fleet.state import FleetState, Task, Worker
from gpuctld.messages import CancelTask, Fault, Hello, Stop, Suspended

SILENCE_S = 10.0
"""Without a beat for that long the process is stopped or holds its interpreter lock."""

STANDSTILL_S = 3.0
"""Between two looks at the workers, which come twice a second: longer, and we did not run."""

STRIKE_S = 10.0
"""Between cancel, SIGTERM and SIGKILL: hard kills have frozen GPUs, so they come last."""

HEALTHY_S = 600.0
MAX_FUTILE_STARTS = 3

FREEING_STRIKE_S = 2.0

MAX_FAULTS = 3
FAULTS_S = 600.0
"""So many GPU faults in that time are the device's, not a program's."""

AWAITS_GPU = "waits for its GPU"

STUCK_S = 10.0
"""A process that has not ended so long after SIGKILL hangs in the kernel, usually in the driver."""


def hello(fleet: FleetState, worker: Worker, message: Hello, now: float) -> None:
    """A worker is up: ready, and its models come back."""
    worker.pid = message.pid
    heard(worker, message.memory, now)
    fleet.set_worker(worker, WorkerState.READY, "", now)
    operations.restore(fleet, worker, now)


def heard(worker: Worker, memory: dict[str, int], now: float, age_s: float = 0.0) -> None:
    """A sign of life with a sample of the device's memory, which may be older."""
    worker.memory, worker.heard_at, worker.sampled_at = memory, now, now - age_s


def suspended(fleet: FleetState, worker: Worker, message: Suspended, now: float) -> None:
    """Its context is off the device until something there needs it."""
    worker.context_bytes = message.context_bytes
    fleet.set_worker(worker, WorkerState.SUSPENDED, "", now)


def woken(fleet: FleetState, worker: Worker, now: float) -> None:
    """Its context is back."""
    worker.context_bytes = 0
    fleet.set_worker(worker, WorkerState.READY, "", now)


def died(fleet: FleetState, worker: Worker, reason: str, now: float) -> None:
    """The process has ended: settle its task, then restart it after a while."""
    task, worker.task = worker.task, None
    starting = worker.state is WorkerState.STARTING
    loading = task is not None and task.step is not None
    for held in worker.models.values():
        held.state = Residency.ABSENT
    if starting or loading:
        worker.futile_starts += 1
    worker.context_bytes = 0
    worker.killed_at = None
    preflight.forget_probes(fleet, worker.gpu)
    if task is not None:
        _settle(fleet, worker, task, reason, now)
    _plan_restart(fleet, worker, reason, now)


def _settle(fleet: FleetState, worker: Worker, task: Task, reason: str, now: float) -> None:
    error = WorkerLost(f"the worker of gpu {worker.gpu} ended: {reason}", "it comes back by itself")
    _fail_task(fleet, worker, task, error, now)


def _fail_task(
    fleet: FleetState, worker: Worker, task: Task, error: GpuctlError, now: float
) -> None:
    if task.step is not None:
        outcomes.lost(fleet, worker, task.step, error, now)
    elif task.job is not None:
        jobs.failed(fleet, task.job, error.to_map(), now)


def fault(fleet: FleetState, worker: Worker, message: Fault, now: float) -> None:
    """A sticky CUDA error: the caller hears of it now, the process is leaving."""
    error = message.error
    task, worker.task = worker.task, None
    worker.faults = [at for at in worker.faults if now - at < FAULTS_S] + [now]
    worker.recovery = message.recovery
    fleet.set_worker(worker, WorkerState.STOPPING, error["message"], now)
    fleet.emit(Send(worker.gpu, Stop()))
    if task is not None:
        _fail_task(fleet, worker, task, GpuFault(error["message"], error["hint"]), now)


def _plan_restart(fleet: FleetState, worker: Worker, reason: str, now: float) -> None:
    if fleet.stopping:
        fleet.set_worker(worker, WorkerState.STOPPING, reason, now)
        worker.pid = 0
        return
    worker.pid = 0
    worker.restarts += 1
    worker.deaths = 1 if now - worker.since > HEALTHY_S else worker.deaths + 1
    state, why = _verdict(worker, reason)
    if state in DOWN:
        fleet.set_worker(worker, state, why, now)
        return
    limits = fleet.config.restart
    delay = min(limits.max, limits.min * 2 ** (worker.deaths - 1))
    worker.respawn_at = now + delay * _jitter(worker)
    fleet.set_worker(worker, state, why, now)


def _verdict(worker: Worker, reason: str) -> tuple[WorkerState, str]:
    """What is to become of a worker that has ended, and why.

    A GPU is never reset by us: the driver's wish for that is passed on to whoever reads the status.
    """
    if worker.recovery:
        return WorkerState.QUARANTINED, f"the driver asks for {worker.recovery}"
    if len(worker.faults) >= MAX_FAULTS:
        why = f"{len(worker.faults)} GPU faults in {FAULTS_S / 60:g} minutes; last: {worker.reason}"
        return WorkerState.QUARANTINED, why
    if worker.futile_starts >= MAX_FUTILE_STARTS:
        why = f"ended {worker.futile_starts} times while starting or loading; last: {reason}"
        return WorkerState.FAILED, why
    return WorkerState.BACKOFF, reason


def _jitter(worker: Worker) -> float:
    """Spread restarts of several workers by up to a fifth, without drawing lots."""
    return 0.8 + 0.2 * ((worker.gpu * 7 + worker.restarts * 3) % 11) / 10


def start(fleet: FleetState, now: float) -> None:
    """Start all workers, for the first time."""
    for worker in fleet.workers.values():
        worker.state, worker.respawn_at = WorkerState.BACKOFF, now
    respawn(fleet, now)


def respawn(fleet: FleetState, now: float) -> None:
    """Start the workers whose time has come.

    Where another program has the GPU that is when it gives it back: a CUDA context alone takes
    half a gigabyte, which it may have taken for itself since.
    """
    for worker in fleet.workers.values():
        due = worker.respawn_at is not None and now >= worker.respawn_at
        if worker.state is not WorkerState.BACKOFF or not due or fleet.stopping:
            continue
        if fleet.is_handed_over(worker.gpu) and not _is_asked_for(fleet, worker):
            _await_gpu(fleet, worker, now)
        else:
            worker.respawn_at = None
            fleet.set_worker(worker, WorkerState.STARTING, "", now)
            fleet.emit(Spawn(worker.gpu))


def _is_asked_for(fleet: FleetState, worker: Worker) -> bool:
    """Somebody has forced a load onto the leased GPU."""
    steps = (step for operation in fleet.operations for step in operation.unfinished)
    return any(step.gpu == worker.gpu and step.target is Tier.DEVICE for step in steps)


def _await_gpu(fleet: FleetState, worker: Worker, now: float) -> None:
    if worker.reason != AWAITS_GPU:
        fleet.set_worker(worker, WorkerState.BACKOFF, AWAITS_GPU, now)


def watch(fleet: FleetState, now: float) -> None:
    """Escalate against workers that are silent, or past a deadline."""
    if now - fleet.watched_at > STANDSTILL_S:
        _hear_again(fleet, now)
    fleet.watched_at = now
    for worker in fleet.workers.values():
        if worker.state is WorkerState.STARTING and worker.pid:
            _watch_start(fleet, worker, now)
        elif worker.up:
            _watch_running(fleet, worker, now)
        elif worker.state is WorkerState.STOPPING and worker.pid:
            _watch_leaving(fleet, worker, now)
        if worker.killed_at is not None and now - worker.killed_at > STUCK_S:
            _give_up(fleet, worker, now)


def _hear_again(fleet: FleetState, now: float) -> None:
    """We were stopped ourselves: what the workers said meanwhile may still be on its way."""
    for worker in fleet.workers.values():
        worker.heard_at = now


def _watch_start(fleet: FleetState, worker: Worker, now: float) -> None:
    if now - worker.since > fleet.config.deadlines.start:
        _kill(fleet, worker, "no hello before the deadline", now)


def _watch_leaving(fleet: FleetState, worker: Worker, now: float) -> None:
    if now - worker.since > STRIKE_S:
        _kill(fleet, worker, worker.reason, now)


def hurry(fleet: FleetState, worker: Worker, until: float, now: float) -> None:
    """The daemon stops and has waited for long enough: what is under way ends now or ``until``."""
    starting = worker.state is WorkerState.STARTING and worker.pid
    if starting and worker.killed_at is None:
        _kill(fleet, worker, "the daemon stops", now)
    elif worker.up and worker.task is not None and worker.task.strikes == 0:
        worker.task.strikes = 1
        worker.task.deadline = min(worker.task.deadline, until)
        fleet.emit(Send(worker.gpu, CancelTask(task=worker.task.id)))


def _watch_running(fleet: FleetState, worker: Worker, now: float) -> None:
    if now - worker.heard_at > SILENCE_S:
        _kill(fleet, worker, f"silent for {SILENCE_S:g} s", now)
    elif worker.task is not None and now >= worker.task.deadline:
        _strike(fleet, worker, worker.task, now)


def _kill(fleet: FleetState, worker: Worker, reason: str, now: float) -> None:
    worker.reason = reason
    worker.heard_at = worker.since = now
    _signal(fleet, worker, signal.SIGKILL, now)


def _signal(fleet: FleetState, worker: Worker, number: int, now: float) -> None:
    if number == signal.SIGKILL and worker.killed_at is None:
        worker.killed_at = now
    fleet.emit(Signal(worker.gpu, number))


def _give_up(fleet: FleetState, worker: Worker, now: float) -> None:
    """No new worker there while the old process is; when that ends after all, one is started."""
    worker.killed_at = None
    why = f"pid {worker.pid} does not end: {worker.reason}"
    task, worker.task = worker.task, None
    for held in worker.models.values():
        held.state = Residency.ABSENT
    preflight.forget_probes(fleet, worker.gpu)
    fleet.set_worker(worker, WorkerState.STUCK, why, now)
    if task is not None:
        _settle(fleet, worker, task, why, now)


def _strike(fleet: FleetState, worker: Worker, task: Task, now: float) -> None:
    """Cancel, SIGTERM, SIGKILL, one after the other. A transfer has no step to cancel at."""
    moving = task.step is not None
    task.strikes = max(task.strikes + 1, 2 if moving else 1)
    task.deadline = now + (FREEING_STRIKE_S if moving else STRIKE_S)
    if task.strikes == 1:
        fleet.emit(Send(worker.gpu, CancelTask(task=task.id)))
    else:
        number = signal.SIGTERM if task.strikes == 2 else signal.SIGKILL
        _signal(fleet, worker, number, now)
