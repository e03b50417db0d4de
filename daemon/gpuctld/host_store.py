"""The host store: one anonymous file per model, within a budget. The controller's side.

A memfd has no name, so nothing is left behind however the daemon ends, and it is shared by
passing its descriptor. Nothing here touches torch or CUDA.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import attrs

from gpuctl.errors import HostMemory

SHARE = 0.8
"""Of the memory that is available at start, when no budget is configured."""


@attrs.define
class _Copy:
    descriptor: int
    reserved: int


class HostStore:
    """Owns the host copies of all models."""

    def __init__(self, budget: int | None = None) -> None:
        self.budget = int(available_bytes() * SHARE) if budget is None else budget
        self._copies: dict[str, _Copy] = {}

    def descriptor(self, model: str, need_bytes: int) -> int:
        """The open file of a model's copy, made and reserved at first use.

        Raises:
            HostMemory: it does not fit the budget, or the memory is not there.
        """
        if model not in self._copies:
            self._check(model, need_bytes)
            flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
            self._copies[model] = _Copy(os.memfd_create(f"gpuctl:{model}", flags), need_bytes)
        return self._copies[model].descriptor

    def _check(self, model: str, need: int) -> None:
        used = self.used_bytes()
        if used + need > self.budget:
            raise HostMemory(
                f"{model} needs {_gib(need)} of host memory; {_gib(self.budget - used)} of the "
                f"budget of {_gib(self.budget)} is left",
                "gpuctl drop another model, or raise host_budget in [daemon]",
            )
        free = available_bytes()
        if need > free:
            raise HostMemory(
                f"{model} needs {_gib(need)} of host memory and {_gib(free)} is available",
                "end other programs, or drop another model",
            )

    def used_bytes(self) -> int:
        """What the copies take: the larger of what was reserved and what was written."""
        return sum(max(c.reserved, os.fstat(c.descriptor).st_size) for c in self._copies.values())

    def release(self, model: str) -> None:
        """Close a copy; the memory goes when the last worker has unmapped it."""
        copy = self._copies.pop(model, None)
        if copy is not None:
            os.close(copy.descriptor)

    def close(self) -> None:
        """Release everything."""
        for model in list(self._copies):
            self.release(model)


def seal(descriptor: int) -> None:
    """Nobody may change the size of a finished copy under the others' mappings."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that can be used: of the machine, and of every control group above us."""
    machine = _meminfo(proc / "meminfo")["MemAvailable"]
    return min([machine, *_group_rooms(proc / "self/cgroup", cgroups)])


def _meminfo(path: Path) -> dict[str, int]:
    fields = (line.split() for line in path.read_text().splitlines())
    return {name.rstrip(":"): int(value) * 1024 for name, value, *_ in fields}


def _group_rooms(membership: Path, root: Path) -> list[int]:
    rooms: list[int] = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "memory.stat", "inactive_file")
            rooms += _rooms_upward(root, path, names)
        elif "memory" in controllers.split(","):
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "memory.stat",
                "total_inactive_file",
            )
            rooms += _rooms_upward(root / "memory", path, names)
    return rooms


def _rooms_upward(root: Path, path: str, names: tuple[str, str, str, str]) -> list[int]:
    """The room in a group and in each of its ancestors; a group without a limit has none."""
    group = root / path.lstrip("/")
    groups = [group, *group.parents]
    inside = [each for each in groups if each == root or root in each.parents]
    rooms = (_room(each, *names) for each in inside)
    return [room for room in rooms if room is not None]


def _room(group: Path, limit: str, usage: str, stat: str, cache: str) -> int | None:
    """Limit less usage; file cache that the kernel can drop does not count as used."""
    try:
        most = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
        stats = dict(line.split() for line in (group / stat).read_text().splitlines())
    except (OSError, ValueError):
        return None
    if most == "max":
        return None
    return max(0, int(most) - used + int(stats.get(cache, 0)))


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
