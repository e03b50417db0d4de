"""How much memory a device has left, and who holds the rest: what the driver says."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Protocol

import torch

from gpuctld import host_store


class Gauge(Protocol):
    """Memory of one device. Safe to ask from any thread, while the device computes."""

    def memory(self) -> dict[str, int]:
        """``total``, ``used`` and ``free`` in bytes."""

    def foreign(self) -> list[dict[str, Any]]:
        """Other processes on the device: ``pid``, ``name``, ``bytes``."""

    def residual(self) -> int:
        """Bytes that this process still holds on the device."""


class CpuGauge:
    """A CPU device's memory is the host's, as far as control groups let us have it."""

    def __init__(self) -> None:
        self._total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def memory(self) -> dict[str, int]:
        free = min(host_store.available_bytes(), self._total)
        return {"total": self._total, "used": self._total - free, "free": free}

    def foreign(self) -> list[dict[str, Any]]:
        return []

    def residual(self) -> int:
        """Private memory: what only this process has, and nobody else maps."""
        fields = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        table = {line.split()[0]: int(line.split()[1]) * 1024 for line in fields}
        return table["Private_Clean:"] + table["Private_Dirty:"]


class NvmlGauge:
    """A CUDA device through NVML, which needs no CUDA context."""

    def __init__(self, uuid: str) -> None:
        import pynvml  # noqa: PLC0415  absent on machines without GPUs

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    def memory(self) -> dict[str, int]:
        info = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return {"total": int(info.total), "used": int(info.used), "free": int(info.free)}

    def foreign(self) -> list[dict[str, Any]]:
        return [
            {"pid": each.pid, "name": _name(each.pid), "bytes": int(each.usedGpuMemory or 0)}
            for each in self._processes()
            if each.pid != os.getpid()
        ]

    def residual(self) -> int:
        held = (p.usedGpuMemory for p in self._processes() if p.pid == os.getpid())
        return int(next(held, 0) or 0)

    def _processes(self) -> list[Any]:
        return list(self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "unknown"


def gauge(device: torch.device, uuid: str) -> Gauge:
    """The gauge that suits a device."""
    return NvmlGauge(uuid) if device.type == "cuda" else CpuGauge()
