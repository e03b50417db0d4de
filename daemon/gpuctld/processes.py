"""Notices the death of processes that are not our children: clients and holders of leases."""

from __future__ import annotations

import os
from collections.abc import Iterator


class Processes:
    """A pidfd per watched process; keys are a client's connection or a lease's id."""

    def __init__(self) -> None:
        self._descriptors: dict[bytes | str, int] = {}
        self._dead: list[bytes | str] = []
        self._later: dict[bytes | str, int] = {}

    def watch(self, key: bytes | str, pid: int) -> None:
        """Watch a process; 0 stands for one that this host's pids do not name."""
        if not pid or key in self._descriptors:
            return
        try:
            self._descriptors[key] = os.pidfd_open(pid)
        except ProcessLookupError:
            self._dead.append(key)
        except OSError:  # out of descriptors for now; a lease may have no other end than this
            self._later[key] = pid

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
        for key, pid in later.items():
            self.watch(key, pid)
