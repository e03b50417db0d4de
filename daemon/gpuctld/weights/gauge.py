"""How much memory a device has left, and who holds the rest: what the driver says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch

from gpuctld import host_store
from gpuctld.weights.nvml_gauge import NvmlGauge


class Gauge(Protocol):
    """Memory of one device. Safe to ask from any thread, while the device computes.

    ``age_s``: of the last sample, in seconds.
    """

    @property
    def age_s(self) -> float: ...

    def memory(self) -> dict[str, int]:
        """``total``, ``used`` and ``free`` in bytes."""

    def foreign(self) -> list[dict[str, Any]]:
        """Other processes on the device: ``pid``, ``name``, ``bytes``."""

    def residual(self) -> int:
        """Bytes that this process still holds on the device."""

    def recovery(self) -> str:
        """What the driver asks for after a fault of the device; empty for nothing."""


class CpuGauge:
    """A CPU device's memory is the host's, as far as control groups let us have it."""

    age_s = 0.0

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

    def recovery(self) -> str:
        return ""


def gauge(device: torch.device, uuid: str) -> Gauge:
    """The gauge that suits a device."""
    return NvmlGauge(uuid) if device.type == "cuda" else CpuGauge()
