"""One model on one device: where its weights are, and how they move."""

from __future__ import annotations

import time
from typing import Any, Protocol

import attrs
import torch

from gpuctl.errors import BadRequest, Corrupt, OutOfMemory
from gpuctl.residency import Tier
from gpuctld.weights import checksum, reading, skeleton, slab, transfer
from gpuctld.weights.adapters import Adapters
from gpuctld.weights.gauge import Gauge
from gpuctld.weights.layout import Layout
from gpuctld.weights.reading import ModelSource
from gpuctld.weights.rendezvous import Meeting
from gpuctld.weights.segment import Segment, pack_table
from gpuctld.weights.skeleton import Plan, Unpackable
from gpuctld.weights.transfer import Progress

CONFIRMED = 0.9
"""Of a model's bytes must be gone from the driver's books before an unload is called done."""

PATIENCE_S = 0.1


@attrs.frozen(kw_only=True)
class Freed:
    """What an unload has given back, as the driver confirms it; bytes and seconds."""

    freed_bytes: int
    residual_bytes: int
    duration_s: float
    foreign: list[dict[str, Any]]


@attrs.frozen(kw_only=True)
class Reloaded:
    """What a reload has moved; ``path`` is the way that the bytes took."""

    bytes: int
    duration_s: float
    path: str


class Mover(Protocol):
    """How the weights of one model come and go."""

    name: str
    reason: str
    device_bytes: int
    host_bytes: int

    def park(self) -> None: ...
    def bring(self, progress: Progress, *, verify: bool, meeting: Meeting | None = None) -> str: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...


class SlabMover:
    """Weights in a slab: leaving is unmapping, coming is a few large copies."""

    name = "slab"
    reason = ""

    def __init__(self, layout: Layout, segment: Segment, memory: slab.Slab) -> None:
        self._layout, self._segment, self._memory = layout, segment, memory
        self._transfer = transfer.for_slab(segment.slab, memory)
        self.device_bytes = self.host_bytes = layout.slab_bytes

    def park(self) -> None:
        self._memory.unmap()

    def bring(self, progress: Progress, *, verify: bool, meeting: Meeting | None = None) -> str:
        """All of it, or nothing: a failure half-way leaves the slab unmapped."""
        try:
            path = self._transfer.fill(self._memory, progress, meeting)
            if verify:
                self._verify()
        except BaseException:
            self._memory.unmap()
            raise
        return path

    def _verify(self) -> None:
        if checksum.of(self._memory.tensor) != self._layout.checksums:
            raise Corrupt(
                f"{self._layout.model}: the weights on the device differ from those loaded",
                "gpuctl drop it and load it again; if it comes back, suspect the memory",
            )

    def pause(self) -> None:
        self._transfer.pause()

    def resume(self) -> None:
        self._transfer.resume()

    def close(self) -> None:
        self._transfer.pause()
        self._memory.close()


class ModuleMover:
    """What no slab can hold moves by the modules' own ``.to()``, with a private host copy."""

    name = "module"

    def __init__(self, pipeline: Any, device: torch.device, reason: str) -> None:
        self._pipeline, self._device = pipeline, device
        self.reason = reason
        self.device_bytes = self.host_bytes = _module_bytes(pipeline)

    def park(self) -> None:
        self._pipeline.to("cpu")

    def bring(self, progress: Progress, *, verify: bool, meeting: Meeting | None = None) -> str:
        del meeting  # each moves its own copy
        if verify:
            raise BadRequest("a model that moves by .to() has no checksum", "reload without it")
        self._pipeline.to(self._device)
        progress(self.device_bytes, self.device_bytes)
        return "module"

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def close(self) -> None:
        self._pipeline.to("meta")


def _module_bytes(pipeline: Any) -> int:
    modules = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
    tensors = {t.data_ptr(): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Resident:
    """A model that a worker has: on its device, or parked in host memory."""

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        mover: Mover,
        layout: Layout | None,
        gauge: Gauge,
    ) -> None:
        self.pipeline = pipeline
        self.layout = layout
        self.tier = Tier.DEVICE
        self.adapters = Adapters(pipeline, device)
        self._mover = mover
        self._gauge = gauge

    @property
    def moves_by(self) -> str:
        return self._mover.name

    @property
    def moves_by_reason(self) -> str:
        return self._mover.reason

    @property
    def device_bytes(self) -> int:
        return self._mover.device_bytes

    @property
    def host_bytes(self) -> int:
        return self._mover.host_bytes

    def unload(self) -> Freed:
        """Device to host: free the device and account for what is left."""
        started = time.perf_counter()
        before = self._gauge.residual()
        self.adapters.park()
        self._mover.park()
        self.tier = Tier.HOST
        after = self._settled(before - int(self.device_bytes * CONFIRMED))
        return Freed(
            freed_bytes=max(0, before - after),
            residual_bytes=after,
            duration_s=time.perf_counter() - started,
            foreign=self._gauge.foreign(),
        )

    def _settled(self, expected: int) -> int:
        """What this process still holds, once the driver's books have followed."""
        deadline = time.monotonic() + PATIENCE_S
        after = self._gauge.residual()
        while after > expected > 0 and time.monotonic() < deadline:
            time.sleep(0.001)
            after = self._gauge.residual()
        return after

    def reload(
        self, progress: Progress, *, verify: bool = False, meeting: Meeting | None = None
    ) -> Reloaded:
        """Host to device; together with the other workers of a ``meeting``.

        Raises:
            OutOfMemory: the device has not enough; the model stays parked.
            Corrupt: ``verify`` found other bytes; the model stays parked.
        """
        started = time.perf_counter()
        try:
            path = self._mover.bring(progress, verify=verify, meeting=meeting)
            self.adapters.bring()
        except torch.OutOfMemoryError as full:
            raise OutOfMemory(str(full).splitlines()[0]) from None
        self.tier = Tier.DEVICE
        seconds = time.perf_counter() - started
        return Reloaded(bytes=self.device_bytes, duration_s=seconds, path=path)

    def release_pins(self) -> None:
        """Unpin the host copy, before the driver takes this process's context away."""
        self._mover.pause()

    def restore_pins(self) -> None:
        """Pin it again in the background."""
        self._mover.resume()

    def drop(self) -> None:
        """Give everything back: device, addresses, mappings."""
        del self.pipeline, self.adapters
        self._mover.close()


def load(
    source: ModelSource, descriptor: int, device: torch.device, gauge: Gauge, progress: Progress
) -> Resident:
    """Read a model from disk, pack it into the host copy, and attach to that.

    Raises:
        BadModel: names the file.
        OutOfMemory: the device has not enough.
    """
    pipeline = reading.read(source)
    try:
        plan = skeleton.plan(pipeline)
    except Unpackable as why:
        return _by_module(pipeline, device, gauge, str(why), progress)
    layout = _pack(source, pipeline, plan, descriptor, progress)
    del pipeline, plan
    return attach(layout, descriptor, device, gauge, progress)


def _by_module(
    pipeline: Any, device: torch.device, gauge: Gauge, reason: str, progress: Progress
) -> Resident:
    mover = ModuleMover(pipeline, device, reason)
    mover.bring(progress, verify=False)
    return Resident(pipeline, device, mover, None, gauge)


def _pack(
    source: ModelSource, pipeline: Any, plan: Plan, descriptor: int, progress: Progress
) -> Layout:
    table = pack_table(plan.entries)
    segment = Segment.create(descriptor, plan.slab_bytes, plan.skeleton, table)
    done = 0

    def copied(size: int) -> None:
        nonlocal done
        done += size
        progress(done, 2 * plan.slab_bytes)  # the second half is the way to the device

    skeleton.copy_runs(plan.runs, segment.slab, copied)
    return Layout(
        model=source.name,
        pipeline=type(pipeline).__name__,
        dtype=str(getattr(pipeline, "dtype", "")).removeprefix("torch."),
        slab_bytes=plan.slab_bytes,
        skeleton_bytes=len(plan.skeleton),
        checksums=checksum.of(segment.slab),
    )


def attach(
    layout: Layout, descriptor: int, device: torch.device, gauge: Gauge, progress: Progress
) -> Resident:
    """A model from its host copy onto the device; reads no file.

    Raises:
        OutOfMemory: the device has not enough.
    """
    resident = attach_parked(layout, descriptor, device, gauge)
    try:
        resident.reload(progress)
    except BaseException:
        resident.drop()
        raise
    return resident


def attach_parked(layout: Layout, descriptor: int, device: torch.device, gauge: Gauge) -> Resident:
    """A model from its host copy, parked: the object graph is there, the weights are not."""
    segment = Segment(descriptor, layout.slab_bytes)
    memory = slab.for_device(layout.slab_bytes, device)
    pipeline = skeleton.assemble(segment.skeleton(layout), segment.entries(layout), memory.tensor)
    resident = Resident(pipeline, device, SlabMover(layout, segment, memory), layout, gauge)
    resident.tier = Tier.HOST
    return resident
