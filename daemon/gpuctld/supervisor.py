"""Starts, watches and ends the worker processes. Policy (when, how often) is the fleet's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any, Self

import attrs

import gpuctl
from gpuctld.devices import Device
from gpuctld.fleet.events import Died, Spawned
from gpuctld.forkserver import ForkServer
from gpuctld.messages import Ended, Fork, Forked


@attrs.frozen(kw_only=True)
class WorkerSpec:
    """What a worker must know to begin. ``peer_paths``: sockets of all workers, by GPU."""

    device: Device
    endpoint: str
    peer_paths: list[str]
    max_pixels: int
    threads: int | None

    @classmethod
    def from_map(cls, fields: dict[str, Any]) -> Self:
        """The inverse of ``attrs.asdict``."""
        return cls(**fields | {"device": Device(**fields["device"])})


@attrs.define
class Child:
    """A worker: our end of the channel that carries descriptors; a pidfd once it is forked."""

    channel: socket.socket
    pidfd: int | None = None

    def close(self) -> None:
        self.channel.close()
        if self.pidfd is not None:
            os.close(self.pidfd)


class Supervisor:
    """One child per device, forked by the server of :mod:`gpuctld.forkserver`.

    Args:
        specs: what to tell the workers, by GPU.
        main: their entry point, ``module:function``.
        connect: finds or starts a fork server; asked again when one has ended.
    """

    def __init__(
        self, specs: dict[int, WorkerSpec], main: str, connect: Callable[[], ForkServer]
    ) -> None:
        self._specs = specs
        self._main = main
        self._connect = connect
        self._server: ForkServer | None = connect()
        self._children: dict[int, Child] = {}

    def spawn(self, gpu: int) -> None:
        """Have the worker of a device started; :meth:`news` tells when it is.

        Raises:
            GpuctlError: there is no fork server.
        """
        self._server = self._server or self._connect()
        ours, theirs = socket.socketpair()
        with theirs:
            spec = attrs.asdict(self._specs[gpu])
            request = Fork(version=gpuctl.__version__, gpu=gpu, main=self._main, spec=spec)
            self._server.fork(request, theirs)
        self._children[gpu] = Child(ours)

    def descriptors(self) -> list[int]:
        """File descriptors that become readable when there are news."""
        return [self._server.descriptor] if self._server else []

    def news(self) -> Iterator[Spawned | Died]:
        """Which workers were started and which have ended since the last call."""
        if self._server is None:
            return
        try:
            for message, descriptors in self._server.receive():
                yield self._note(message, descriptors)
        except EOFError:
            self._server.close()
            self._server = None
            yield from [self._bury(gpu, "the fork server ended") for gpu in list(self._children)]

    def _note(self, message: Forked | Ended, descriptors: list[int]) -> Spawned | Died:
        if isinstance(message, Ended):
            return self._bury(message.gpu, describe_exit(message.status))
        [self._children[message.gpu].pidfd] = descriptors
        return Spawned(message.gpu, message.pid)

    def _bury(self, gpu: int, reason: str) -> Died:
        self._children.pop(gpu).close()
        return Died(gpu, reason)

    def signal(self, gpu: int, number: int) -> None:
        """Send a signal to a worker, if it is still there."""
        child = self._children.get(gpu)
        if child is not None and child.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, number)

    def send_descriptor(self, gpu: int, name: str, descriptor: int) -> None:
        """Hand an open file to a worker, if it is still there; it takes exactly one per load."""
        child = self._children.get(gpu)
        if child is not None:
            with contextlib.suppress(OSError):  # a dead worker is noticed by its end
                socket.send_fds(child.channel, [name.encode()], [descriptor])

    def dismiss(self) -> None:
        """An orderly end: the fork server leaves too, and with it what it has imported."""
        if self._server is not None:
            self._server.dismiss()

    def close(self) -> None:
        """End every child at once."""
        if self._server is not None:
            self._server.close()


def describe_exit(status: int | None) -> str:
    """An exit status for people."""
    if status is None:
        return "ended"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"left with status {status}"
