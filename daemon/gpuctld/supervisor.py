"""Starts, watches and ends the worker processes. Policy (when, how often) is the fleet's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

import attrs
import torch.multiprocessing

from gpuctld import forkserver
from gpuctld.devices import Device


@attrs.frozen(kw_only=True)
class WorkerSpec:
    """What a worker must know to begin. ``peer_paths``: sockets of all workers, by GPU."""

    device: Device
    endpoint: str
    peer_paths: dict[int, str]
    max_pixels: int
    threads: int | None


WorkerMain = Callable[[WorkerSpec, socket.socket], None]


@attrs.frozen
class Child:
    """A running worker: its process, and our end of the channel that carries descriptors."""

    process: BaseProcess
    channel: socket.socket


class Supervisor:
    """One child per device, forked from the server of :mod:`gpuctld.forkserver`."""

    def __init__(self, specs: dict[int, WorkerSpec], main: WorkerMain) -> None:
        self._specs = specs
        self._main = main
        self._children: dict[int, Child] = {}
        self._context: ForkServerContext = torch.multiprocessing.get_context("forkserver")
        forkserver.start()

    def spawn(self, gpu: int) -> int:
        """Start the worker of a device; its pid.

        Call it from the main thread: the parent-death signal fires when the spawning thread ends.
        """
        ours, theirs = socket.socketpair()
        process = self._context.Process(
            target=self._main, args=(self._specs[gpu], theirs), name=f"gpuctl-worker-{gpu}"
        )
        process.start()
        theirs.close()
        self._children[gpu] = Child(process, ours)
        assert process.pid is not None  # noqa: S101  set by start()
        return process.pid

    def sentinels(self) -> dict[int, int]:
        """File descriptors that become readable when a child has ended, and whose."""
        return {child.process.sentinel: gpu for gpu, child in self._children.items()}

    def bury(self, gpu: int) -> str:
        """Clean up after a child that has ended; how it ended, in words."""
        child = self._children.pop(gpu)
        child.channel.close()
        child.process.join()
        status = child.process.exitcode
        child.process.close()
        return describe_exit(status)

    def signal(self, gpu: int, number: int) -> None:
        """Send a signal to a worker, if it is still there."""
        child = self._children.get(gpu)
        if child is not None and child.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, number)

    def send_descriptor(self, gpu: int, name: str, descriptor: int) -> None:
        """Hand an open file to a worker; it takes exactly one per load."""
        with contextlib.suppress(OSError):  # a dead worker is noticed by its sentinel
            socket.send_fds(self._children[gpu].channel, [name.encode()], [descriptor])

    def kill_all(self) -> None:
        """End every child at once."""
        for gpu in list(self._children):
            self.signal(gpu, signal.SIGKILL)
            self.bury(gpu)


def describe_exit(status: int | None) -> str:
    """An exit status for people."""
    if status is None:
        return "ended"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"left with status {status}"
