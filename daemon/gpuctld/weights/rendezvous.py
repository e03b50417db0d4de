"""Workers that reload a model together meet over Unix sockets and show each other their memory.

The sockets stand in the daemon's private directory (mode 0700). Every pair of workers shares one
connection: the higher rank connects, the lower accepts. The first packet each way names the
reload (``token``) and carries file descriptors of the sender's device memory. No CUDA in here.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

import attrs

HELLO_BYTES = 16 * 1024
MOST_DESCRIPTORS = 250
"""The kernel passes at most 253 with one packet."""

PATIENCE_S = 1.0
"""Who has not come by then is not waited for: each can do the work alone."""

Memory = list[tuple[int, int]]
"""File descriptor and size in bytes of each piece of device memory, in order of addresses."""


class Listener:
    """Where a worker's peers find it, for as long as it lives."""

    def __init__(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            Path(path).unlink()  # a killed worker's
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.bind(path)
        self.socket.listen(64)

    def close(self) -> None:
        self.socket.close()


@attrs.frozen(kw_only=True)
class Meeting:
    """One reload of one model by several workers. ``paths``: each one's listener, by rank."""

    token: str
    rank: int
    paths: list[str]
    listener: Listener

    @property
    def world(self) -> int:
        return len(self.paths)


@attrs.frozen
class Link:
    """A connection to a peer, and the memory that it has shown; the descriptors are ours."""

    rank: int
    connection: socket.socket
    memory: Memory

    def close(self) -> None:
        self.connection.close()
        for descriptor, _ in self.memory:
            os.close(descriptor)


def meet(meeting: Meeting, memory: Memory, patience_s: float = PATIENCE_S) -> list[Link]:
    """Connect to all peers that come in time; those that do not are simply absent."""
    deadline = time.monotonic() + patience_s
    links: list[Link] = []
    if len(memory) > MOST_DESCRIPTORS:
        return links
    for rank in range(meeting.rank):
        with contextlib.suppress(OSError, ValueError):
            links.append(_connect(meeting, rank, memory, deadline))
    while len(links) < meeting.world - 1:
        try:
            link = _accept(meeting, memory, deadline)
        except OSError:
            break
        if link is not None:
            links.append(link)
    return links


def _connect(meeting: Meeting, rank: int, memory: Memory, deadline: float) -> Link:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_left(deadline))
        connection.connect(meeting.paths[rank])
        _say_hello(connection, meeting, memory)
        return _hear_hello(connection, meeting, deadline)
    except BaseException:
        connection.close()
        raise


def _accept(meeting: Meeting, memory: Memory, deadline: float) -> Link | None:
    """The next caller, or ``None`` if it came for another reload or left again."""
    meeting.listener.socket.settimeout(_left(deadline))
    connection, _ = meeting.listener.socket.accept()
    try:
        link = _hear_hello(connection, meeting, deadline)
        _say_hello(connection, meeting, memory)
    except (OSError, ValueError):
        connection.close()
        return None
    return link


def _say_hello(connection: socket.socket, meeting: Meeting, memory: Memory) -> None:
    sizes = [size for _, size in memory]
    hello = {"token": meeting.token, "rank": meeting.rank, "sizes": sizes}
    socket.send_fds(connection, [json.dumps(hello).encode()], [fd for fd, _ in memory])


def _hear_hello(connection: socket.socket, meeting: Meeting, deadline: float) -> Link:
    connection.settimeout(_left(deadline))
    packet, descriptors, _, _ = socket.recv_fds(connection, HELLO_BYTES, MOST_DESCRIPTORS)
    try:
        hello = json.loads(packet)
        sizes = hello["sizes"] if hello["token"] == meeting.token else []
        memory = list(zip(descriptors, sizes, strict=True))
    except (ValueError, KeyError):
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return Link(int(hello["rank"]), connection, memory)


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())
