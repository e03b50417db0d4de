"""One model on one device: where its weights are, and how they move."""

from __future__ import annotations

import time
from typing import Any

import attrs
import torch

from gpuctl.errors import Busy, OutOfMemory
from gpuctl.residency import Tier
from gpuctld.weights import checksum, reading, skeleton, slab
from gpuctld.weights.adapters import Adapters
from gpuctld.weights.gauge import Gauge
from gpuctld.weights.layout import Layout
from gpuctld.weights.movers import ModuleMover, Mover, SlabMover
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


class Resident:
    """A model that a worker has: on its device, or parked in host memory."""

    def __init__(
        self,
        pipeline: Any,
        mover: Mover,
        layout: Layout | None,
        gauge: Gauge,
    ) -> None:
        self.pipeline = pipeline
        self.layout = layout
        self.tier = Tier.DEVICE
        self.adapters = Adapters(pipeline, mover)
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
        """Of the model and its adapters together."""
        return self._mover.device_bytes + self.adapters.device_bytes

    @property
    def host_bytes(self) -> int:
        """Of the model, whose copy all workers share, and of its adapters, which each has."""
        return self._mover.host_bytes + self.adapters.host_bytes

    def unload(self) -> Freed:
        """Device to host: free the device and account for what is left."""
        started = time.perf_counter()
        before = self._gauge.residual()
        self._park()
        after = self._settled(before - int(self.device_bytes * CONFIRMED))
        return Freed(
            freed_bytes=max(0, before - after),
            residual_bytes=after,
            duration_s=time.perf_counter() - started,
            foreign=self._gauge.foreign(),
        )

    def _park(self) -> None:
        self.adapters.park()
        self._mover.park()
        self.tier = Tier.HOST

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

        All of it or nothing: after a failure the model and its adapters are parked.

        Raises:
            OutOfMemory: the device has not enough.
            Corrupt: ``verify`` found other bytes.
            BadModel: an adapter that waited for the device cannot be loaded.
        """
        started = time.perf_counter()
        try:
            path = self._bring(progress, verify=verify, meeting=meeting)
        except BaseException:
            self._park()
            raise
        self.tier = Tier.DEVICE
        seconds = time.perf_counter() - started
        return Reloaded(bytes=self.device_bytes, duration_s=seconds, path=path)

    def _bring(self, progress: Progress, *, verify: bool, meeting: Meeting | None) -> str:
        try:
            path = self._mover.bring(progress, verify=verify, meeting=meeting)
            self.adapters.bring(verify=verify)
        except torch.OutOfMemoryError as full:
            raise OutOfMemory(str(full).splitlines()[0]) from None
        return path

    def add_adapter(self, name: str, path: str, scale: float) -> None:
        """Load an adapter onto the model, or change the scale of one that is there.

        Raises:
            Busy: the model is not on the device, which loading an adapter takes.
            BadRequest: the pipeline takes no adapters.
            BadModel: the file is missing, damaged, made for another model, or changes the model.
            OutOfMemory: the device has not enough; the model is as it was.
        """
        if self.tier is not Tier.DEVICE:
            raise Busy("an adapter is added to a model on its device", "gpuctl reload first")
        self.adapters.add(name, path, scale)

    def release_pins(self) -> None:
        """Unpin the host copies, before the driver takes this process's context away."""
        self._mover.pause()
        self.adapters.pause()

    def restore_pins(self) -> None:
        """Pin them again in the background."""
        self._mover.resume()
        self.adapters.resume()

    def drop(self) -> None:
        """Give everything back: device, addresses, mappings."""
        self.adapters.close()
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
    return Resident(pipeline, mover, None, gauge)


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
    mover = SlabMover(layout.model, segment.slab, memory, layout.checksums)
    resident = Resident(pipeline, mover, layout, gauge)
    resident.tier = Tier.HOST
    return resident
