"""A worker's main thread: one task after the other, in the order in which they come."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch

from gpuctl.errors import BadRequest, GpuctlError, OutOfMemory, SuspendRefused
from gpuctld import weights
from gpuctld.messages import (
    ChangeAdapter,
    Command,
    Done,
    Failed,
    Fault,
    Hello,
    LoadModel,
    Progress,
    ReloadModel,
    RunJob,
    Stop,
    Suspend,
    Suspended,
    UnloadModel,
    Woken,
)
from gpuctld.supervisor import WorkerSpec
from gpuctld.weights import Layout, Listener, Meeting, ModelSource, Resident
from gpuctld.worker import generate
from gpuctld.worker.lifeline import volunteer_for_oom
from gpuctld.worker.link import Link

STICKY = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "invalid program counter",
    "uncorrectable",
    "hardware stack error",
    "launch timed out",
    "cuda error: unknown error",
)
"""Errors after which CUDA answers every call with the same error until the process ends."""

FAULT_STATUS = 70
DISMISSAL_S = 2.0

CPU_NICENESS = 10
"""A worker that computes on the CPU gives way to the controller, which must answer at once."""


def main(spec: WorkerSpec, channel: socket.socket) -> None:
    """The process's entry point. ``channel`` brings the descriptors of host copies."""
    volunteer_for_oom()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C is the controller's business
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _bind_device(spec)
    Worker(spec, channel).run()


def _bind_device(spec: WorkerSpec) -> None:
    """Show CUDA our device alone, before anything has asked it."""
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["CUDA_VISIBLE_DEVICES"] = spec.device.uuid
    if not spec.device.is_cuda:
        torch.set_num_threads(spec.threads or 1)
        os.nice(CPU_NICENESS)


class Worker:
    """Executes commands on the device; holds the models that live here."""

    def __init__(self, spec: WorkerSpec, channel: socket.socket) -> None:
        self._spec = spec
        self._channel = channel
        self._device = torch.device("cuda:0" if spec.device.is_cuda else "cpu")
        self._models: dict[str, Resident] = {}
        self._gauge = weights.gauge(self._device, spec.device.uuid)
        self._context = weights.context(self._device)
        self._listener = Listener(spec.peer_paths[spec.device.gpu])
        self._link = Link(spec.endpoint, self._gauge)
        self._handlers: dict[type[Any], Callable[[Any, Sequence[Any]], None]] = {
            LoadModel: self._load,
            UnloadModel: self._unload,
            Suspend: self._suspend,
            ReloadModel: self._reload,
            ChangeAdapter: self._change_adapter,
            RunJob: self._generate,
        }

    def run(self) -> None:
        """Serve until told to stop, or until a sticky CUDA error."""
        if self._spec.device.is_cuda:
            torch.zeros(1, device=self._device)  # the context, before the first request needs it
        self._link.send(Hello(pid=os.getpid(), memory=self._gauge.memory()))
        self._link.start()
        while True:
            command, blobs = self._link.inbox.get()
            if isinstance(command, Stop):
                break
            self._execute(command, blobs)
        self._drop_all()
        self._link.close()

    def _drop_all(self) -> None:
        if self._context.suspended:  # nothing is on the device, and CUDA would wait for ever
            self._link.close()
            os._exit(0)
        for name in list(self._models):
            self._models.pop(name).drop()

    def _execute(self, command: Any, blobs: Sequence[Any]) -> None:
        try:
            self._handlers[type(command)](command, blobs)
        except GpuctlError as error:
            self._link.send(Failed(task=command.task, error=error.to_map()))
        except torch.cuda.OutOfMemoryError as error:
            self._out_of_memory(command, error)
        except Exception as error:  # noqa: BLE001  whatever a pipeline raises is its job's answer
            self._unexpected(command, error)

    def _out_of_memory(self, command: Command, error: Exception) -> None:
        torch.cuda.empty_cache()
        first = str(error).splitlines()[0]
        failed = OutOfMemory(first, "a smaller image, or unload another model")
        self._link.send(Failed(task=_task(command), error=failed.to_map()))

    def _unexpected(self, command: Command, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        if is_sticky(error):
            self._leave(command, message)
        failed = GpuctlError(message)
        self._link.send(Failed(task=_task(command), error=failed.to_map()))

    def _leave(self, command: Command, message: str) -> None:
        """A poisoned context is never used again: tell, and end the process."""
        error = {"code": "gpu_fault", "message": message, "hint": "the worker is replaced"}
        recovery = self._gauge.recovery()
        self._link.send(Fault(task=_task(command), error=error, recovery=recovery))
        self._await_dismissal()
        os._exit(FAULT_STATUS)

    def _await_dismissal(self) -> None:
        """Until the controller has heard us: it sees our end sooner than what we said before it."""
        with contextlib.suppress(queue.Empty):
            while not isinstance(self._link.inbox.get(timeout=DISMISSAL_S)[0], Stop):
                pass

    # --- models -----------------------------------------------------------------------------

    def _load(self, command: LoadModel, _: Sequence[Any]) -> None:
        descriptor = self._take_descriptor()
        self._wake()
        source = ModelSource(**command.source)
        try:
            resident = self._bring_up(command, source, descriptor)
        finally:
            os.close(descriptor)
        self._put_adapters(resident, command.adapters)
        self._models[source.name] = resident
        layout = resident.layout.to_map() if resident.layout and not command.layout else None
        self._done(command, resident, layout=layout)

    def _bring_up(self, command: LoadModel, source: ModelSource, descriptor: int) -> Resident:
        progress = self._progress(command.task)
        layout = Layout.from_map(command.layout) if command.layout else None
        if layout is None:
            resident = weights.load(source, descriptor, self._device, self._gauge, progress)
            if command.tier == "host":
                resident.unload()
            return resident
        if command.tier == "host":
            return weights.attach_parked(layout, descriptor, self._device, self._gauge)
        return weights.attach(layout, descriptor, self._device, self._gauge, progress)

    def _put_adapters(self, resident: Resident, adapters: Sequence[dict[str, Any]]) -> None:
        """All of them, or the model is given up: no weights stay that nobody knows of."""
        put = resident.add_adapter if resident.tier == "device" else resident.adapters.expect
        try:
            for adapter in adapters:
                put(adapter["name"], adapter["path"], adapter["scale"])
        except BaseException:
            resident.drop()
            raise

    def _take_descriptor(self) -> int:
        _, descriptors, _, _ = socket.recv_fds(self._channel, 256, 1)
        return descriptors[0]

    def _unload(self, command: UnloadModel, _: Sequence[Any]) -> None:
        resident = self._models[command.model]
        with self._briefly_awake():
            freed = resident.unload()
            about = _about(resident)
            if command.tier == "disk":
                self._models.pop(command.model).drop()
        self._link.send(Done(task=command.task, result={**about, **attrs.asdict(freed)}))

    def _suspend(self, command: Suspend, _: Sequence[Any]) -> None:
        freed = self._sleep()
        result = {"freed_bytes": freed, "residual_bytes": self._gauge.residual()}
        self._link.send(Done(task=command.task, result=result))

    def _sleep(self) -> int:
        """Give the context back; the bytes that this frees.

        Without pinned memory there is next to nothing for the driver to move.
        """
        before = self._gauge.residual()
        for resident in self._models.values():
            resident.release_pins()
        try:
            self._context.suspend()
        except SuspendRefused:
            self._restore_pins()
            raise
        freed = max(0, before - self._gauge.residual())
        self._link.send(Suspended(context_bytes=freed))
        return freed

    @contextlib.contextmanager
    def _briefly_awake(self) -> Iterator[None]:
        """Taking memory's addresses back is work on the device; whoever has that now keeps it."""
        suspended = self._context.suspended
        self._wake()
        try:
            yield
        finally:
            if suspended:
                self._sleep()

    def _wake(self) -> None:
        if self._context.suspended:
            self._context.wake()
            self._link.send(Woken())
            self._restore_pins()

    def _restore_pins(self) -> None:
        for resident in self._models.values():
            resident.restore_pins()

    def _reload(self, command: ReloadModel, _: Sequence[Any]) -> None:
        self._wake()
        resident = self._models[command.model]
        reloaded = resident.reload(
            self._progress(command.task),
            verify=command.verify,
            meeting=self._meeting(command.fanout),
        )
        self._done(command, resident, path=reloaded.path)

    def _meeting(self, plan: dict[str, Any] | None) -> Meeting | None:
        if plan is None:
            return None
        paths = [self._spec.peer_paths[gpu] for gpu in plan["gpus"]]
        return Meeting(token=plan["token"], rank=plan["rank"], paths=paths, listener=self._listener)

    def _change_adapter(self, command: ChangeAdapter, _: Sequence[Any]) -> None:
        resident = self._models[command.model]
        if command.path is None:
            with self._briefly_awake():
                resident.adapters.remove(command.adapter)
        else:
            resident.add_adapter(command.adapter, command.path, command.scale)
        self._done(command, resident)

    def _done(self, command: Command, resident: Resident, **result: Any) -> None:
        self._link.send(Done(task=_task(command), result={**_about(resident), **result}))

    # --- jobs -------------------------------------------------------------------------------

    def _generate(self, command: RunJob, blobs: Sequence[Any]) -> None:
        resident = self._models.get(command.model)
        if resident is None or resident.tier != "device":
            raise BadRequest(f"{command.model} is not on this device")
        generate.check_call(resident.pipeline, command.params, command.images)
        inputs = generate.decode_images(command.images, blobs, self._spec.max_pixels)
        pictures = list(
            generate.run(
                resident.pipeline,
                command,
                inputs,
                self._progress(command.task),
                lambda: self._link.is_cancelled(command.task),
            )
        )
        images = [{"blob": index, **each.about} for index, each in enumerate(pictures)]
        blobs_out = [each.data for each in pictures]
        self._link.send(Done(task=command.task, result={"images": images}), blobs_out)

    def _progress(self, task: str) -> Callable[[int, int], None]:
        return lambda done, total: self._link.send(Progress(task=task, done=done, total=total))


def is_sticky(error: BaseException) -> bool:
    """Whether a CUDA error leaves the context unusable."""
    text = str(error).lower()
    cuda = isinstance(error, torch.AcceleratorError) or "cuda" in text
    return cuda and any(phrase in text for phrase in STICKY)


def _about(resident: Resident) -> dict[str, Any]:
    """What every answer about a model says."""
    return {
        "device_bytes": resident.device_bytes,
        "host_bytes": resident.host_bytes,
        "moves_by": resident.moves_by,
        "moves_by_reason": resident.moves_by_reason,
        "adapters": resident.adapters.list(),
    }


def _task(command: Any) -> str:
    with contextlib.suppress(AttributeError):
        return str(command.task)
    return ""
