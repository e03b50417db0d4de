"""The machine itself: each event to its handler, then everything that has become possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpuctl.errors import Busy, Cancelled, GpuctlError
from gpuctl.protocol import (
    Cancel,
    LoraList,
)
from gpuctl.residency import JobState, Residency, Tier, WorkerState
from gpuctld.catalog import Catalog
from gpuctld.config import Config
from gpuctld.devices import Device
from gpuctld.fleet import (
    handback,
    jobs,
    leases,
    moves,
    operations,
    outcomes,
    phases,
    preflight,
    report,
    snapshot,
    workers,
)
from gpuctld.fleet.effects import Answer, Effect, Send
from gpuctld.fleet.events import (
    Booted,
    ClientGone,
    Died,
    Event,
    Heard,
    HolderDied,
    Reconfigured,
    Requested,
    Spawned,
    Stopping,
    Tick,
)
from gpuctld.fleet.snapshot import Snapshot
from gpuctld.fleet.state import FleetState, Operation, Purpose, StepState, Task, Worker
from gpuctld.messages import (
    Beat,
    Done,
    Failed,
    Fault,
    Hello,
    Probed,
    Progress,
    Stop,
    Suspended,
    Woken,
)

Handler = Callable[["Fleet", Any, float], None]


class Fleet:
    """Workers, models, jobs and leases of one daemon.

    The only writer of :class:`FleetState`; readers take ``state``.
    """

    def __init__(self, config: Config, catalog: Catalog, devices: list[Device]) -> None:
        crew = {device.gpu: Worker(device) for device in devices}
        self.state = FleetState(config, catalog, crew, phases=config.phases)

    @property
    def ready(self) -> bool:
        """Every worker has said hello at least once, has used up its attempts, or must wait."""
        on_the_way = {WorkerState.STARTING, WorkerState.BACKOFF}
        return all(
            worker.state not in on_the_way or self.state.is_handed_over(worker.gpu)
            for worker in self.state.workers.values()
        )

    @property
    def stopped(self) -> bool:
        """Stopping, and no worker process is left that could still end."""
        left = [worker for worker in self.state.workers.values() if worker.pid]
        return self.state.stopping and all(each.state is WorkerState.STUCK for each in left)

    @property
    def snapshot(self) -> Snapshot:
        """What the state file keeps."""
        return snapshot.take(self.state)

    def apply(self, event: Event, now: float) -> list[Effect]:
        """Take one event at monotonic time ``now`` (seconds); what to do about it, in order."""
        _HANDLERS[type(event)](self, event, now)
        self._advance(now)
        effects, self.state.effects = self.state.effects, []
        return effects

    def _advance(self, now: float) -> None:
        leases.advance(self.state, now)
        while ended := operations.advance(self.state, now):
            for operation in ended:
                self._ended(operation, now)
            leases.advance(self.state, now)
        self._abort_jobs(now)
        jobs.dispatch(self.state, now)

    def _abort_jobs(self, now: float) -> None:
        for operation in self.state.operations:
            if operation.started and operation.abort_jobs:
                jobs.abort_on(self.state, operation.gpus, now)

    def _ended(self, operation: Operation, now: float) -> None:
        leases.operation_ended(self.state, operation, now)
        if operation.name in {"unload", "phase"}:
            jobs.refuse_stranded(self.state, now)

    # --- clients ----------------------------------------------------------------------------

    def _requested(self, event: Requested, now: float) -> None:
        try:
            self._accept(event, now)
        except GpuctlError as error:
            self.state.emit(Answer(event.request.id, report.refusal(event.request, error)))

    def _accept(self, event: Requested, now: float) -> None:
        if self.state.stopping and event.request.op not in _WHILE_STOPPING:
            raise Busy("the daemon is stopping", "start it again, or ask later")
        _REQUESTS[event.request.op](self, event, now)

    def _cancel(self, event: Requested, now: float) -> None:
        request: Cancel = event.request
        found = self._cancel_target(event, Cancelled("cancelled on request"), now)
        self.state.emit(Answer(request.id, report.reply(request.id, "cancel", cancelled=found)))

    def _cancel_target(self, event: Requested, why: GpuctlError, now: float) -> bool:
        target: str = event.request.target
        if target in self.state.jobs:
            jobs.cancel(self.state, self.state.jobs[target], why, now)
            return True
        lease = self.state.leases.get(target)
        if lease is not None:
            handback.cancel(self.state, lease, event.peer, why, now)
            return True
        return operations.cancel(self.state, target, why, now)

    def _lease_list(self, event: Requested, now: float) -> None:
        id_ = event.request.id
        listing = leases.listing(self.state, now)
        self.state.emit(Answer(id_, report.reply(id_, "lease_list", leases=listing)))

    def _lora_list(self, event: Requested, now: float) -> None:
        request: LoraList = event.request
        model = self.state.catalog[request.model].name
        rows = [
            {"gpu": worker.gpu, "model": model, "adapters": held.adapters, "error": None}
            for worker, held in self.state.holders(model)
        ]
        self.state.emit(Answer(request.id, report.reply(request.id, "lora_list", workers=rows)))

    def _models(self, event: Requested, now: float) -> None:
        id_ = event.request.id
        self.state.emit(Answer(id_, report.reply(id_, "models", models=report.models(self.state))))

    def _client_gone(self, event: ClientGone, now: float) -> None:
        jobs.cancel_of_client(self.state, event.client, now)
        handback.client_gone(self.state, event.client, now)

    def _holder_died(self, event: HolderDied, now: float) -> None:
        handback.holder_died(self.state, event.lease, now)

    # --- workers ----------------------------------------------------------------------------

    def _heard(self, event: Heard, now: float) -> None:
        worker = self.state.workers[event.gpu]
        _SAID[type(event.message)](self, worker, event, now)

    def _hello(self, worker: Worker, event: Heard, now: float) -> None:
        workers.hello(self.state, worker, event.message, now)

    def _beat(self, worker: Worker, event: Heard, now: float) -> None:
        message: Beat = event.message
        workers.heard(worker, message.memory, now, message.age_s)

    def _suspended(self, worker: Worker, event: Heard, now: float) -> None:
        workers.suspended(self.state, worker, event.message, now)

    def _woken(self, worker: Worker, event: Heard, now: float) -> None:
        workers.woken(self.state, worker, now)

    def _probed(self, worker: Worker, event: Heard, now: float) -> None:
        message: Probed = event.message
        workers.heard(worker, message.memory, now)
        probe = {"memory": message.memory, "foreign": message.foreign}
        preflight.probed(self.state, message.task, worker.gpu, probe)
        leases.probed(self.state, message.task, worker.gpu, probe, now)

    def _progress(self, worker: Worker, event: Heard, now: float) -> None:
        message: Progress = event.message
        task = worker.task
        if task is None or task.id != message.task:
            return
        if task.job is not None:
            jobs.stepped(self.state, worker, task.job, message.done, message.total, now)
        elif task.step is not None:
            outcomes.progress(self.state, task.step, message.done, message.total)

    def _done(self, worker: Worker, event: Heard, now: float) -> None:
        message: Done = event.message
        task = _settled(worker, message.task)
        if task.job is not None:
            jobs.finished(self.state, task.job, message.result, event.blobs, now)
        elif task.step is not None:
            outcomes.done(self.state, worker, task.step, message.result, now)

    def _failed(self, worker: Worker, event: Heard, now: float) -> None:
        message: Failed = event.message
        task = _settled(worker, message.task)
        if task.job is not None:
            jobs.failed(self.state, task.job, message.error, now)
        elif task.step is not None:
            outcomes.failed(self.state, worker, task.step, message.error, now)

    def _fault(self, worker: Worker, event: Heard, now: float) -> None:
        workers.fault(self.state, worker, event.message, now)

    def _spawned(self, event: Spawned, now: float) -> None:
        worker = self.state.workers[event.gpu]
        worker.pid, worker.since = event.pid, now

    def _died(self, event: Died, now: float) -> None:
        workers.died(self.state, self.state.workers[event.gpu], event.reason, now)

    # --- the daemon itself ------------------------------------------------------------------

    def _booted(self, event: Booted, now: float) -> None:
        for gpu, models in event.snapshot.wanted.items():
            worker = self.state.workers.get(gpu)
            if worker is not None:
                known = {name: tier for name, tier in models.items() if name in self.state.catalog}
                worker.wanted.update(known)
        for worker in self.state.workers.values():
            worker.suspend_wanted = worker.gpu in event.snapshot.suspended
        for kept in event.snapshot.leases:
            leases.adopt(self.state, kept, now)
        workers.start(self.state, now)

    def _reconfigured(self, event: Reconfigured, now: float) -> None:
        """Models that left the catalog leave the workers too; new ones may be asked for."""
        self.state.phases = event.phases
        gone = [m.name for m in self.state.catalog if m.name not in event.catalog]
        for name in gone:
            self._drop(name, now)
        self.state.catalog = event.catalog

    def _drop(self, model: str, now: float) -> None:
        self.state.restores += 1
        id_ = f"drop-{self.state.restores}"
        holders = [worker for worker, _ in self.state.holders(model)]
        steps = moves.unload_steps(self.state, holders, id_, Tier.DISK, model)
        operation = Operation(id_, "unload", steps, now, purpose=Purpose.NOBODY)
        operations.begin(self.state, operation)

    def _stopping(self, event: Stopping, now: float) -> None:
        """Refuse new work, drop what waits; what runs may finish until the limit."""
        self.state.stopping = True
        self._stop_by = now + self.state.config.deadlines.stop
        why = Cancelled("the daemon is stopping")
        for operation in list(self.state.operations):
            operations.cancel(self.state, operation.id, why, now)
        for job in list(self.state.jobs.values()):
            if job.state is JobState.QUEUED:
                jobs.cancel(self.state, job, why, now)

    def _drain(self, now: float) -> None:
        """Send home who is idle; in the second half of the time hurry the others."""
        late = now >= self._stop_by - self.state.config.deadlines.stop / 2
        for worker in self.state.workers.values():
            if worker.idle:
                self.state.set_worker(worker, WorkerState.STOPPING, "the daemon stops", now)
                self.state.emit(Send(worker.gpu, Stop()))
            elif late:
                workers.hurry(self.state, worker, self._stop_by, now)

    def _tick(self, event: Tick, now: float) -> None:
        workers.watch(self.state, now)
        workers.respawn(self.state, now)
        operations.expire(self.state, now)
        jobs.expire(self.state, now)
        jobs.give_up(self.state, now)
        handback.expire(self.state, now)
        self._unload_unused(now)
        if self.state.stopping:
            self._drain(now)

    def _unload_unused(self, now: float) -> None:
        """``keep_alive``: park models that no job has used for that long."""
        for model in self.state.catalog:
            if model.keep_alive is not None and not self._in_use(model.name, model.keep_alive, now):
                self._park(model.name, now)

    def _in_use(self, model: str, keep_alive: float, now: float) -> bool:
        queued = any(job.model == model for job in self.state.jobs.values())
        moving = any(
            step.model == model and step.state is not StepState.ENDED
            for operation in self.state.operations
            for step in operation.steps
        )
        loaded = [h for _, h in self.state.holders(model) if h.state is Residency.LOADED]
        recent = any(now < held.used_at + keep_alive for held in loaded)
        return queued or moving or recent or not loaded

    def _park(self, model: str, now: float) -> None:
        self.state.restores += 1
        id_ = f"idle-{self.state.restores}"
        loaded = [w for w, held in self.state.holders(model) if held.state is Residency.LOADED]
        steps = moves.unload_steps(self.state, loaded, id_, Tier.HOST, model)
        operation = Operation(id_, "unload", steps, now, purpose=Purpose.NOBODY)
        operations.begin(self.state, operation)


def _settled(worker: Worker, task_id: str) -> Task:
    """The task that an answer belongs to, now over; an empty one for an answer to nothing."""
    task = worker.task
    if task is None or task.id != task_id:
        return Task(task_id, 0.0)
    worker.task = None
    return task


def _on(call: Callable[[FleetState, Any, float], None]) -> Handler:
    """A handler for requests that only need the request."""

    def handle(fleet: Fleet, event: Requested, now: float) -> None:
        call(fleet.state, event.request, now)

    return handle


def _with_peer(call: Callable[[FleetState, Requested, float], None]) -> Handler:
    """A handler for requests that need to know who asks."""

    def handle(fleet: Fleet, event: Requested, now: float) -> None:
        call(fleet.state, event, now)

    return handle


_WHILE_STOPPING = frozenset({"cancel", "lease_list", "lease_release", "models"})

_REQUESTS: Mapping[str, Handler] = {
    "load": _on(moves.load),
    "unload": _on(moves.unload),
    "reload": _on(moves.reload),
    "phase": _on(phases.enter),
    "lora_add": _on(moves.change_adapter),
    "lora_remove": _on(moves.change_adapter),
    "lora_list": Fleet._lora_list,  # noqa: SLF001  the table belongs to the class
    "generate": _with_peer(jobs.submit),
    "lease_acquire": _with_peer(leases.acquire),
    "lease_release": _with_peer(handback.release),
    "lease_renew": _with_peer(leases.renew),
    "lease_list": Fleet._lease_list,  # noqa: SLF001
    "cancel": Fleet._cancel,  # noqa: SLF001
    "models": Fleet._models,  # noqa: SLF001
}
"""``ping``, ``status`` and ``subscribe`` are the controller's own."""

_SAID: Mapping[type, Callable[[Fleet, Worker, Heard, float], None]] = {
    Hello: Fleet._hello,  # noqa: SLF001
    Beat: Fleet._beat,  # noqa: SLF001
    Probed: Fleet._probed,  # noqa: SLF001
    Progress: Fleet._progress,  # noqa: SLF001
    Done: Fleet._done,  # noqa: SLF001
    Suspended: Fleet._suspended,  # noqa: SLF001
    Woken: Fleet._woken,  # noqa: SLF001
    Failed: Fleet._failed,  # noqa: SLF001
    Fault: Fleet._fault,  # noqa: SLF001
}

_HANDLERS: Mapping[type, Handler] = {
    Requested: Fleet._requested,  # noqa: SLF001
    ClientGone: Fleet._client_gone,  # noqa: SLF001
    HolderDied: Fleet._holder_died,  # noqa: SLF001
    Heard: Fleet._heard,  # noqa: SLF001
    Spawned: Fleet._spawned,  # noqa: SLF001
    Died: Fleet._died,  # noqa: SLF001
    Booted: Fleet._booted,  # noqa: SLF001
    Reconfigured: Fleet._reconfigured,  # noqa: SLF001
    Stopping: Fleet._stopping,  # noqa: SLF001
    Tick: Fleet._tick,  # noqa: SLF001
}
