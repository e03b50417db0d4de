"""Where connections come in, and how to stop them from coming.

libzmq's ipc listener aborts the process when descriptors run out, and its ``unbind`` ends every
connection that came through the listener. So an ipc entrance is shut by putting a dead socket file
in the place of the live one: the kernel refuses newcomers, those inside stay.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import zmq

MOST_DESCRIPTORS = 4_096
"""Connections cost memory as well, so a generous limit on descriptors is not used up."""
ARRIVALS = 64
OPEN_AGAIN = 0.75
"""Of the limit: a little room, so that the entrances do not flap."""

_MODE = stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP


class Entrance(Protocol):
    """One endpoint of a door."""

    def open(self) -> bool: ...
    def shut(self) -> None: ...
    def close(self) -> None: ...


class IpcEntrance:
    """A bound ipc path. The live socket has a second name, under which it survives a shutting."""

    def __init__(self, door: zmq.Socket[Any], path: Path) -> None:
        self._path = path
        self._live = path.with_suffix(".live")
        self._next = path.with_suffix(".next")
        self.close()  # stale files: the lock says that nobody serves them
        door.bind(f"ipc://{path}")
        path.chmod(_MODE)
        self._live.hardlink_to(path)

    def open(self) -> bool:
        """Let connections in again."""
        self._next.unlink(missing_ok=True)
        self._next.hardlink_to(self._live)
        self._next.replace(self._path)  # does nothing if it is open already
        self._next.unlink(missing_ok=True)
        return True

    def shut(self) -> None:
        """Have newcomers refused (``ECONNREFUSED``); present connections stay."""
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(self._next))
        self._next.chmod(_MODE)
        self._next.replace(self._path)

    def close(self) -> None:
        """Remove the files."""
        for path in (self._path, self._live, self._next):
            path.unlink(missing_ok=True)


class DescriptorGuard:
    """Shuts the entrances above half of the descriptors, opens them below.

    ``monitor`` becomes readable when a connection has come; descriptors are counted then, and on
    every look while the entrances are shut. It holds 1,001 arrivals (libzmq's default queue and
    one): then libzmq accepts nobody until somebody looks. So a process with 4,096 descriptors or
    more cannot be outrun however busy it is; one with fewer can, by a storm.
    """

    def __init__(self, door: zmq.Socket[Any], entrances: Sequence[Entrance]) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.limit = min(soft // 2, MOST_DESCRIPTORS)
        self.shut = False
        self._door = door
        self._entrances = entrances
        arrivals = f"inproc://arrivals-{id(door)}"
        door.monitor(arrivals, zmq.Event.ACCEPTED)
        self.monitor: zmq.Socket[bytes] = door.context.socket(zmq.PAIR)
        self.monitor.set(zmq.RCVHWM, 1)
        self.monitor.connect(arrivals)

    def look(self) -> None:
        """Count if there is a reason to, and act on it."""
        came = self._arrivals()
        if self.shut:
            if open_descriptors() < self.limit * OPEN_AGAIN:
                self.shut = not all(each.open() for each in self._entrances)
        elif came and open_descriptors() > self.limit:
            self.shut = True
            for each in self._entrances:
                each.shut()

    def close(self) -> None:
        """Shut the entrances for good. libzmq must not wait for us meanwhile, hence the order."""
        with contextlib.suppress(OSError):  # somebody may have removed the folder
            for each in self._entrances:
                each.shut()
        while self._arrivals():
            pass
        self._door.monitor(None, 0)
        self.monitor.close(linger=0)

    def _arrivals(self) -> bool:
        """Whether connections have come; takes a few only, so that a storm is counted as well."""
        came = 0
        with contextlib.suppress(zmq.Again):
            while came < ARRIVALS:
                self.monitor.recv_multipart(zmq.DONTWAIT)
                came += 1
        return came > 0


def open_descriptors() -> int:
    """Descriptors that this process has open, the one for counting included."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  the cheapest way there is


def raise_limit() -> None:
    """Use all descriptors that the process may have: the soft limit is for ``select``."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
