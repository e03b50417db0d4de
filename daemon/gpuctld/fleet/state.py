"""Everything the fleet knows. Data with its invariants; the decisions are in the other modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any

import attrs

from gpuctl import residency
from gpuctl.errors import Busy, GpuctlError, UnknownGpu
from gpuctl.protocol import Generate
from gpuctl.residency import JobState, Residency, Tier, WorkerState
from gpuctld.catalog import Catalog
from gpuctld.config import Config, PhaseConfig
from gpuctld.devices import Device
from gpuctld.fleet.effects import Effect, Publish
from gpuctld.fleet.events import Peer


@attrs.define
class Holding:
    """One model on one worker."""

    model: str
    state: Residency = Residency.ABSENT
    device_bytes: int = 0
    host_bytes: int = 0
    moves_by: str = ""
    moves_by_reason: str = ""
    adapters: list[dict[str, Any]] = attrs.field(factory=list)
    error: dict[str, Any] | None = None
    used_at: float = 0.0

    def go(self, to: Residency) -> None:
        """Take a legal step; a step to where it is already is none."""
        if to is not self.state:
            self.state = residency.step(self.state, to)


class StepState(StrEnum):
    """One worker's part of an operation."""

    WAITING = "waiting"
    SENT = "sent"
    ENDED = "ended"


@attrs.frozen
class AdapterChange:
    """Put an adapter on a loaded model, or take it off when ``path`` is ``None``.

    It can be taken off a parked model too. To be put on, it must be read into the model.
    """

    adapter: str
    path: str | None = None
    scale: float = 1.0

    def is_possible(self, state: Residency) -> bool:
        """Whether it can be made where the model is."""
        removable = self.path is None and state is Residency.PARKED
        return removable or state is Residency.LOADED

    def refusal(self, model: str) -> Busy:
        """Why it cannot be made."""
        return Busy(f"{model} is not loaded", f"gpuctl load {model}")


@attrs.define(eq=False)
class Step:
    """Bring one model on one worker to one tier. ``row`` is its line of the reply, once ended.

    With ``change`` the model stays where it is and an adapter comes or goes. With ``suspend``
    it is about no model but about the worker's CUDA context. ``done``: the part of the bytes
    that has been moved, 0 to 1.
    """

    gpu: int
    model: str
    target: Tier
    operation: str
    state: StepState = StepState.WAITING
    origin: Tier = Tier.DISK
    sent_at: float = 0.0
    done: float = 0.0
    suspend: bool = False
    change: AdapterChange | None = None
    row: dict[str, Any] | None = None

    @classmethod
    def suspending(cls, gpu: int, operation: str) -> Step:
        """Give the context back; to come after the steps that unload the worker's models."""
        return cls(gpu, "", Tier.HOST, operation, suspend=True)

    @property
    def task(self) -> str:
        return f"{self.operation}/{self.gpu}/{self.model}"

    @property
    def moves(self) -> bool:
        """It is about where a model is."""
        return self.change is None and not self.suspend

    @property
    def failed(self) -> bool:
        return self.row is not None and self.row["error"] is not None


class Purpose(StrEnum):
    """Who waits for an operation to end."""

    ANSWER = "answer"
    LEASE_BEGIN = "lease_begin"
    LEASE_END = "lease_end"
    NOBODY = "nobody"


@attrs.define(eq=False)
class Operation:
    """A load, unload or reload over some workers, in the order of acceptance.

    ``forced``: the leases in force on its GPUs, as their lines in the answer.
    """

    id: str
    name: str
    steps: list[Step]
    accepted_at: float
    purpose: Purpose = Purpose.ANSWER
    lease: str = ""
    serial: bool = False
    fail_fast: bool = False
    verify: bool = False
    fanout: bool = True
    abort_jobs: bool = False
    wait_until: float = 0.0
    deadline: float = float("inf")
    forced: list[dict[str, Any]] = attrs.field(factory=list)
    started: bool = False
    probes: dict[int, dict[str, Any] | None] | None = None
    probe_at: float = 0.0

    @property
    def gpus(self) -> set[int]:
        return {step.gpu for step in self.steps}

    @property
    def unfinished(self) -> list[Step]:
        return [step for step in self.steps if step.state is not StepState.ENDED]


@attrs.define(eq=False)
class Job:
    """One generate request."""

    request: Generate
    client: bytes
    blobs: Sequence[Any]
    queued_at: float
    state: JobState = JobState.QUEUED
    gpu: int | None = None
    started_at: float = 0.0
    step: int = 0
    steps: int = 0
    cancelled_by: GpuctlError | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def model(self) -> str:
        return self.request.model


class LeaseState(StrEnum):
    """A lease's life: waits behind another, empties the GPUs, is held, brings models back."""

    WAITING = "waiting"
    UNLOADING = "unloading"
    PROBING = "probing"
    HELD = "held"
    RELOADING = "reloading"


RELOAD_WAIT_S = 30.0
"""For the memory of the program that had the GPUs to be gone."""


@attrs.define(eq=False)
class Lease:
    """GPUs handed to another program. ``restore``: what was loaded on each when it began."""

    id: str
    gpus: list[int]
    client: bytes
    holder: Peer
    command: str
    queue_jobs: bool
    ttl_s: float | None
    asked_at: float
    need_bytes: int = 0
    abort_jobs: bool = False
    suspend: bool = False
    wait_until: float = 0.0
    deadline: float = float("inf")
    state: LeaseState = LeaseState.WAITING
    renewed_at: float = 0.0
    restore: dict[int, list[str]] = attrs.field(factory=dict)
    unload_rows: list[dict[str, Any]] = attrs.field(factory=list)
    probes: dict[int, dict[str, Any]] = attrs.field(factory=dict)
    probe_at: float = 0.0
    asked_workers_at: float = 0.0
    answered: bool = False
    release_request: str = ""
    reload_wait_s: float = RELOAD_WAIT_S
    reload_deadline: float = float("inf")
    ended_because: str = ""

    @property
    def active(self) -> bool:
        return self.state is not LeaseState.WAITING

    @property
    def whose(self) -> str:
        """The holder, for messages."""
        return f"pid {self.holder.pid} {self.command}".rstrip()

    @property
    def ending(self) -> bool:
        """Whether nobody uses the GPUs any more and the models are on their way back."""
        return self.state is LeaseState.RELOADING


@attrs.define(eq=False)
class Task:
    """What a worker is doing, and until when it may."""

    id: str
    deadline: float
    step: Step | None = None
    job: Job | None = None
    strikes: int = 0


@attrs.define(eq=False)
class Worker:
    """The process that owns one device. ``wanted``: the tier each model shall be in.

    ``suspend_wanted``: its context shall be off the device until a model goes there.
    ``context_bytes``: what a suspended worker takes of the device when it wakes. ``faults``: when
    GPU faults were seen. ``recovery``: what the driver then asked for. ``killed_at``: the SIGKILL
    that it has not ended on yet.
    """

    device: Device
    state: WorkerState = WorkerState.STARTING
    reason: str = ""
    pid: int = 0
    memory: dict[str, int] = attrs.field(factory=lambda: {"total": 0, "used": 0, "free": 0})
    models: dict[str, Holding] = attrs.field(factory=dict)
    wanted: dict[str, Tier] = attrs.field(factory=dict)
    suspend_wanted: bool = False
    context_bytes: int = 0
    task: Task | None = None
    restarts: int = 0
    futile_starts: int = 0
    deaths: int = 0
    faults: list[float] = attrs.field(factory=list)
    recovery: str = ""
    killed_at: float | None = None
    since: float = 0.0
    heard_at: float = 0.0
    sampled_at: float = 0.0
    respawn_at: float | None = None

    @property
    def gpu(self) -> int:
        return self.device.gpu

    @property
    def up(self) -> bool:
        """Its process answers, with or without a CUDA context."""
        return self.state in {WorkerState.READY, WorkerState.SUSPENDED}

    @property
    def idle(self) -> bool:
        return self.up and self.task is None

    def holding(self, model: str) -> Holding:
        """The model's place on this worker; made on first use."""
        return self.models.setdefault(model, Holding(model))

    def state_of(self, model: str) -> Residency:
        """The model's residency here; absent if never heard of."""
        return self.models[model].state if model in self.models else Residency.ABSENT


@attrs.define(eq=False)
class FleetState:
    """All of it, and the effects decided in the current turn."""

    config: Config
    catalog: Catalog
    workers: dict[int, Worker]
    phases: dict[str, PhaseConfig] = attrs.field(factory=dict)
    operations: list[Operation] = attrs.field(factory=list)
    jobs: dict[str, Job] = attrs.field(factory=dict)
    leases: dict[str, Lease] = attrs.field(factory=dict)
    layouts: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    stopping: bool = False
    effects: list[Effect] = attrs.field(factory=list)
    restores: int = 0
    watched_at: float = 0.0

    def emit(self, effect: Effect) -> None:
        """Have the controller do something after this turn."""
        self.effects.append(effect)

    def publish(self, event: str, to: str | None = None, **fields: Any) -> None:
        """Tell subscribers, and the client of the request ``to``."""
        self.emit(Publish({"event": event, **fields}, to))

    def select(self, gpus: Sequence[int] | None) -> list[Worker]:
        """The named workers, or all of them.

        Raises:
            UnknownGpu: a number that no worker has.
        """
        if gpus is None:
            return list(self.workers.values())
        unknown = [gpu for gpu in gpus if gpu not in self.workers]
        if unknown:
            known = ", ".join(map(str, self.workers))
            raise UnknownGpu(f"no GPU {unknown[0]}", f"this daemon owns {known}")
        return [self.workers[gpu] for gpu in dict.fromkeys(gpus)]

    def operation(self, id_: str) -> Operation | None:
        """The unfinished operation of that id."""
        return next((op for op in self.operations if op.id == id_), None)

    def promised(self, worker: Worker) -> dict[str, Tier]:
        """The tier of each model once every accepted operation is done."""
        tiers = dict(worker.wanted)
        for operation in self.operations:
            for step in operation.unfinished:
                if step.gpu == worker.gpu and step.moves and operation.name != "restore":
                    tiers[step.model] = step.target
        return tiers

    def lease_on(self, gpu: int) -> Lease | None:
        """The lease in force on a GPU."""
        return next((x for x in self.leases.values() if x.active and gpu in x.gpus), None)

    def is_handed_over(self, gpu: int) -> bool:
        """Whether another program has the GPU now, so that nothing of ours starts there."""
        lease = self.lease_on(gpu)
        return lease is not None and lease.state is LeaseState.HELD

    def holders(self, model: str) -> Iterator[tuple[Worker, Holding]]:
        """Every worker where the model is more than absent."""
        for worker in self.workers.values():
            held = worker.models.get(model)
            if held is not None and held.state is not Residency.ABSENT:
                yield worker, held

    def set_residency(self, worker: Worker, model: str, state: Residency) -> None:
        """Step a model's residency and tell."""
        held = worker.holding(model)
        held.go(state)
        self.publish("residency", gpu=worker.gpu, model=model, state=str(state))

    def set_lease(self, lease: Lease, state: LeaseState) -> None:
        """Change a lease's state and tell."""
        lease.state = state
        self.publish("lease", lease=lease.id, gpus=lease.gpus, state=str(state))

    def set_worker(self, worker: Worker, state: WorkerState, reason: str, now: float) -> None:
        """Change a worker's state and tell."""
        worker.state, worker.reason, worker.since = state, reason, now
        self.publish("worker", gpu=worker.gpu, state=str(state), reason=reason)
