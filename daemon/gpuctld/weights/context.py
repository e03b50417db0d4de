"""A worker's hold on its device beside the weights: the CUDA context, given back while parked.

A context with its kernels and workspaces is 600 MiB and more. The driver can move everything that
a process has on a GPU to host memory and back (CUDA driver API, process checkpointing; driver 570
or newer), and a process may ask that for itself. With the slabs unmapped and the host memory
unpinned there is next to nothing to move. While a process is suspended its CUDA calls wait.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch

from gpuctl.errors import GpuctlError, SuspendRefused

LOCK_TIMEOUT_MS = 10_000


class Context(Protocol):
    """What every device's context can do."""

    suspended: bool

    def suspend(self) -> None:
        """Give the context back.

        Raises:
            SuspendRefused: the context is still there, and works.
        """

    def wake(self) -> None:
        """Take the context again.

        Raises:
            OutOfMemory: the device has not enough; the context stays suspended.
        """


class PlainContext:
    """A CPU holds nothing that could be given back."""

    def __init__(self) -> None:
        self.suspended = False

    def suspend(self) -> None:
        self.suspended = True

    def wake(self) -> None:
        self.suspended = False


class FixedContext:
    """A device whose driver has no way to give a context back."""

    suspended = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def suspend(self) -> None:
        raise SuspendRefused(f"{self._device.type} devices cannot be suspended", _REMEDY)

    def wake(self) -> None:
        """It is never away."""


class CudaContext:
    """This process's context on its one GPU."""

    def __init__(self, device: torch.device) -> None:
        from gpuctld.weights import driver  # noqa: PLC0415  cuda-bindings, absent without GPUs

        self._device = device
        self._driver = driver
        self.suspended = False

    def suspend(self) -> None:
        torch.cuda.synchronize(self._device)
        pid = os.getpid()
        try:
            self._driver.lock_process(pid, LOCK_TIMEOUT_MS)
        except GpuctlError as refused:
            raise SuspendRefused(refused.message, _REMEDY) from None
        try:
            self._driver.checkpoint_process(pid)
        except GpuctlError as refused:
            self._driver.unlock_process(pid)
            raise SuspendRefused(refused.message, _REMEDY) from None
        self.suspended = True

    def wake(self) -> None:
        pid = os.getpid()
        self._driver.restore_process(pid)
        self._driver.unlock_process(pid)
        self.suspended = False


_REMEDY = "the models are unloaded all the same; leave out --suspend"


def context(device: torch.device) -> Context:
    """The context that suits a device."""
    if device.type == "cpu":
        return PlainContext()
    if device.type == "cuda" and torch.version.hip is None:
        return CudaContext(device)
    return FixedContext(device)
