"""Memory for a model's weights on a device, at an address that never changes.

``map`` takes the memory, ``unmap`` gives it back; the tensors that are views of it stay valid in
between but must not be touched.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any, Protocol

import attrs
import torch

from gpuctl.errors import OutOfMemory

HANDLE_BYTES = 1024 * 1024 * 1024
"""Of device memory per handle: few enough to map and unmap 24 GB in some 10 ms each. Handles of
2 MiB take 390 ms."""


class Slab(Protocol):
    """What every device's slab can do. ``tensor`` is uint8, one dimension, ``size`` long."""

    size: int
    tensor: torch.Tensor

    def map(self) -> Iterator[tuple[int, int]]:
        """Take the device memory piece by piece; yields start and size of each, in bytes.

        A piece can be written as soon as it is yielded, while the next one is being mapped.

        Raises:
            OutOfMemory: the device has not enough; what was taken goes with ``unmap``.
        """

    def unmap(self) -> None:
        """Give the device memory back to the driver, once nothing uses it any more."""

    def close(self) -> None:
        """Give the addresses back as well; no view may be used any more."""


class CpuSlab:
    """Plain memory. Unmapping tells the kernel to take the pages; the addresses stay."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._mapping = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.uint8, count=size)

    def map(self) -> Iterator[tuple[int, int]]:
        """Pages come with the first write."""
        yield 0, self.size

    def unmap(self) -> None:
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self.unmap()


class TorchSlab:
    """One allocation of torch's own, for devices without a virtual memory interface.

    Resizing the storage to nothing frees it; every view shares the storage and follows when it
    is resized back, to a new address.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.tensor = torch.empty(size, dtype=torch.uint8, device=device)
        self.unmap()

    def map(self) -> Iterator[tuple[int, int]]:
        self.tensor.untyped_storage().resize_(self.size)
        yield 0, self.size

    def unmap(self) -> None:
        self.tensor.untyped_storage().resize_(0)
        torch.get_device_module(self.tensor.device).empty_cache()

    def close(self) -> None:
        self.unmap()


@attrs.frozen
class _Raw:
    """Device memory as torch takes it over without a copy: the CUDA array interface."""

    address: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }


@attrs.frozen
class _Piece:
    address: int
    size: int
    handle: Any


class CudaSlab:
    """An address range reserved once; memory is created and mapped on each reload.

    The parameters' addresses outlive an unload, and so do captured CUDA graphs and compiled code
    that have them built in. Touching an unmapped address kills the context: whoever runs the
    model looks at its tier first.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        from gpuctld.weights import driver  # noqa: PLC0415  cuda-bindings, absent without GPUs

        self.size = size
        self.device = device.index or 0
        self._driver = driver
        self._unit = driver.granularity(self.device)
        self._reserved = -(-max(size, 1) // self._unit) * self._unit
        self.address = driver.reserve(self._reserved)
        self._pieces: list[_Piece] = []
        self.tensor = self._wrap()

    def _wrap(self) -> torch.Tensor:
        """Torch asks the driver whose memory it is, so some must be there for a moment."""
        self._map_piece(0, self._unit)
        tensor = torch.as_tensor(_Raw(self.address, self.size), device=f"cuda:{self.device}")
        self.unmap()
        return tensor

    def map(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """As :class:`Slab` says; begins with the piece in which byte ``first`` is."""
        starts = range(0, self._reserved, HANDLE_BYTES)
        at = first // HANDLE_BYTES
        for start in (*starts[at:], *starts[:at]):
            size = min(HANDLE_BYTES, self._reserved - start)
            self._map_piece(start, size)
            yield start, min(size, self.size - start)

    def _map_piece(self, start: int, size: int) -> None:
        handle = self._create(size)
        try:
            self._driver.map_at(self.address + start, size, handle, self.device)
        except BaseException:
            self._driver.release(handle)
            raise
        self._pieces.append(_Piece(self.address + start, size, handle))

    def _create(self, size: int) -> Any:
        try:
            return self._driver.create(size, self.device)
        except OutOfMemory:
            torch.cuda.empty_cache()  # what torch keeps for later is ours now
            return self._driver.create(size, self.device)

    def export(self) -> list[tuple[int, int]]:
        """A file descriptor and the size of each piece, by address; the caller closes them."""
        ordered = sorted(self._pieces, key=lambda piece: piece.address)
        return [(self._driver.export(piece.handle), piece.size) for piece in ordered]

    def unmap(self) -> None:
        torch.cuda.synchronize(self.device)
        while self._pieces:
            piece = self._pieces.pop()
            self._driver.unmap(piece.address, piece.size)
            self._driver.release(piece.handle)
        torch.cuda.empty_cache()  # the activations' memory as well

    def close(self) -> None:
        self.unmap()
        self._driver.free_addresses(self.address, self._reserved)


def for_device(size: int, device: torch.device) -> Slab:
    """The slab that suits a device."""
    if device.type == "cpu":
        return CpuSlab(size)
    if device.type == "cuda" and torch.version.hip is None:
        return CudaSlab(size, device)
    return TorchSlab(size, device)
