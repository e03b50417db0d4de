"""Memory for a model's weights on a device, at an address that never changes.

``map`` takes the memory, ``unmap`` gives it back; the tensors that are views of it stay valid in
between but must not be touched.
"""

from __future__ import annotations

import mmap
from typing import Protocol

import torch


class Slab(Protocol):
    """What every device's slab can do. ``tensor`` is uint8, one dimension, ``size`` long."""

    size: int
    tensor: torch.Tensor

    def map(self) -> None:
        """Take the device memory.

        Raises:
            OutOfMemory: the device has not enough.
        """

    def unmap(self) -> None:
        """Give the device memory back to the driver."""

    def close(self) -> None:
        """Give the addresses back as well; no view may be used any more."""


class CpuSlab:
    """Plain memory. Unmapping tells the kernel to take the pages; the addresses stay."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._mapping = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.uint8, count=size)

    def map(self) -> None:
        """Nothing: pages come with the first write."""

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

    def map(self) -> None:
        self.tensor.untyped_storage().resize_(self.size)

    def unmap(self) -> None:
        self.tensor.untyped_storage().resize_(0)
        torch.get_device_module(self.tensor.device).empty_cache()

    def close(self) -> None:
        self.unmap()


def for_device(size: int, device: torch.device) -> Slab:
    """The slab that suits a device."""
    if device.type == "cpu":
        return CpuSlab(size)
    return TorchSlab(size, device)
