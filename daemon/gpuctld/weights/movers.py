"""How weights come and go: in a slab, or by the modules' own ``.to()``.

A model has one mover. What joins it later, an adapter, has one of its own beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch

from gpuctl.errors import BadRequest, Corrupt
from gpuctld.weights import checksum, skeleton, slab
from gpuctld.weights.rendezvous import Meeting
from gpuctld.weights.transfer import PlainTransfer, Progress, Transfer


class Mover(Protocol):
    """Weights that are on the device or parked. ``device_bytes`` and ``host_bytes``: in each."""

    name: str
    reason: str

    @property
    def device_bytes(self) -> int: ...

    @property
    def host_bytes(self) -> int: ...

    def park(self) -> None:
        """Give the device memory back; harmless where it is given back already."""

    def bring(self, progress: Progress, *, verify: bool, meeting: Meeting | None = None) -> str:
        """Host to device, all of it or nothing; the way that the bytes took.

        Raises:
            OutOfMemory: the device has not enough.
            Corrupt: ``verify`` found other bytes.
        """

    def is_intact(self) -> bool:
        """Whether the bytes on the device are those of the host copy, as far as can be told."""

    def adopt(self, label: str, tensors: Sequence[torch.Tensor]) -> Mover:
        """How tensors that have joined the model, and are on its device, move from now on."""

    def pause(self) -> None:
        """Unpin the host copy."""

    def resume(self) -> None:
        """Pin it again, in the background."""

    def close(self) -> None:
        """Give everything back; nothing may use the weights any more."""


class SlabMover:
    """Weights in a slab: leaving is unmapping, coming is a few large copies.

    Args:
        label: whose weights, for messages.
        source: the host copy, uint8.
        memory: a slab of the same size.
        checksums: of ``source``.
    """

    name = "slab"
    reason = ""

    def __init__(
        self, label: str, source: torch.Tensor, memory: slab.Slab, checksums: list[int]
    ) -> None:
        self._label, self._checksums = label, checksums
        self._source, self._memory = source, memory
        self._transfer = _transfer(source, memory)

    @classmethod
    def of_tensors(cls, label: str, tensors: Sequence[torch.Tensor], device: torch.device) -> Self:
        """Move tensors into a slab of their own; their host copy is made here, once.

        Raises:
            OutOfMemory: the device has not enough; the tensors are where they were.
        """
        runs, entries, size = skeleton.place(tensors)
        source = slab.CpuSlab(size).tensor
        skeleton.copy_runs(runs, source, lambda _: None)
        memory = slab.for_device(size, device)
        made = cls(label, source, memory, checksum.of(source))
        try:
            made.bring(lambda *_: None, verify=False)
        except BaseException:
            made.close()
            raise
        for tensor, entry in zip(tensors, entries, strict=True):
            tensor.data = skeleton.view_of(memory.tensor, entry)
        return made

    @property
    def device_bytes(self) -> int:
        return self._source.numel()

    @property
    def host_bytes(self) -> int:
        return self._source.numel()

    def park(self) -> None:
        self._memory.unmap()

    def bring(self, progress: Progress, *, verify: bool, meeting: Meeting | None = None) -> str:
        try:
            path = self._transfer.fill(self._memory, progress, meeting)
            if verify:
                self._verify()
        except BaseException:
            self._memory.unmap()
            raise
        return path

    def _verify(self) -> None:
        if not self.is_intact():
            raise Corrupt(
                f"{self._label}: the weights on the device differ from those loaded",
                "gpuctl drop it and load it again; if it comes back, suspect the memory",
            )

    def is_intact(self) -> bool:
        return checksum.of(self._memory.tensor) == self._checksums

    def adopt(self, label: str, tensors: Sequence[torch.Tensor]) -> Mover:
        return SlabMover.of_tensors(label, tensors, self._memory.tensor.device)

    def pause(self) -> None:
        self._transfer.pause()

    def resume(self) -> None:
        self._transfer.resume()

    def close(self) -> None:
        self._transfer.pause()
        self._memory.close()


def _transfer(source: torch.Tensor, memory: slab.Slab) -> Transfer:
    """The transfer that suits a slab."""
    if isinstance(memory, slab.CudaSlab):
        from gpuctld.weights.cuda_transfer import CudaTransfer  # noqa: PLC0415  needs cuda-bindings

        return CudaTransfer(source, memory)
    return PlainTransfer(source)


class ModuleMover:
    """What no slab can hold moves by the modules' own ``.to()``, with a private host copy."""

    name = "module"

    def __init__(self, pipeline: Any, device: torch.device, reason: str) -> None:
        self._pipeline, self._device = pipeline, device
        self.reason = reason

    @property
    def device_bytes(self) -> int:
        """Counted anew each time: adapters are modules of the pipeline as well."""
        return _module_bytes(self._pipeline)

    @property
    def host_bytes(self) -> int:
        return self.device_bytes

    def park(self) -> None:
        self._pipeline.to("cpu")

    def bring(self, progress: Progress, *, verify: bool, meeting: Meeting | None = None) -> str:
        del meeting  # each moves its own copy
        if verify:
            raise BadRequest("a model that moves by .to() has no checksum", "reload without it")
        self._pipeline.to(self._device)
        progress(self.device_bytes, self.device_bytes)
        return "module"

    def is_intact(self) -> bool:
        """What is on the device is what is parked next: nothing is lost."""
        return True

    def adopt(self, label: str, tensors: Sequence[torch.Tensor]) -> Mover:
        del label, tensors
        return _Aboard()

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


class _Aboard:
    """Tensors of a pipeline whose own ``.to()`` moves and counts them."""

    name = "module"
    reason = ""
    device_bytes = host_bytes = 0

    def park(self) -> None:
        pass

    def bring(self, progress: Progress, *, verify: bool, meeting: Meeting | None = None) -> str:
        del progress, verify, meeting
        return "module"

    def is_intact(self) -> bool:
        return True

    def adopt(self, label: str, tensors: Sequence[torch.Tensor]) -> Mover:
        del label, tensors
        return self

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def close(self) -> None:
        pass
