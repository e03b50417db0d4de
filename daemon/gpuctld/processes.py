"""Notices the death of processes that are not our children: clients and holders of leases."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path


class Processes:
    """A pidfd per watched process; keys are a client's connection or a lease's id."""

    def __init__(self) -> None:
        self._descriptors: dict[bytes | str, int] = {}
        self._dead: list[bytes | str] = []
        self._later: dict[bytes | str, tuple[int, float]] = {}

    def watch(self, key: bytes | str, pid: int, since: float = math.inf) -> None:
        """Watch a process; 0 stands for one that this host's pids do not name.

        ``since``: it was there at that monotonic time (seconds). A process that began later has
        been given a dead one's pid.
        """
        if not pid or key in self._descriptors:
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._dead.append(key)
        except OSError:  # out of descriptors for now; a lease may have no other end than this
            self._later[key] = pid, since
        else:
            self._keep(key, descriptor, is_the_same=_began(pid) <= since)

    def _keep(self, key: bytes | str, descriptor: int, *, is_the_same: bool) -> None:
        if is_the_same:
            self._descriptors[key] = descriptor
        else:
            os.close(descriptor)
            self._dead.append(key)

    def forget(self, key: bytes | str) -> None:
        """Stop watching."""
        self._later.pop(key, None)
        descriptor = self._descriptors.pop(key, None)
        if descriptor is not None:
            os.close(descriptor)

    def descriptors(self) -> list[int]:
        """Readable when a process has ended."""
        return list(self._descriptors.values())

    def ended(self, ready: set[object]) -> Iterator[bytes | str]:
        """Keys of processes that have ended, each once."""
        self._try_again()
        dead = [key for key, descriptor in self._descriptors.items() if descriptor in ready]
        for key in dead:
            self.forget(key)
        late, self._dead = self._dead, []
        yield from [*late, *dead]

    def _try_again(self) -> None:
        later, self._later = self._later, {}
        for key, (pid, since) in later.items():
            self.watch(key, pid, since)


def _began(pid: int) -> float:
    """Monotonic time (seconds) at which a process began, give or take a clock tick.

    The kernel counts from the boot and does not stop while the machine sleeps (proc(5), field 22 of
    stat). Long ago where it hides other users' processes: then the pid alone must do.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -math.inf
    asleep = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK") - asleep
