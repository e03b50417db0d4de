"""``gpuctld-workers``: the process that workers are forked from.

It imports torch and diffusers once and never touches CUDA, so a worker is up in a fraction of a
second. It serves one controller at a time. As a service of its own it outlives the controller:
the next one finds the imports done, and the last worker of the one before gone.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import gpuctl
from gpuctld import messages
from gpuctld.forkserver import MAX_PACKET
from gpuctld.messages import Ended, Fork, Forked
from gpuctld.service_manager import Notifier
from gpuctld.supervisor import WorkerSpec
from gpuctld.worker.lifeline import die_with

LISTEN_FD = 3
"""sd_listen_fds(3): the first descriptor that a socket unit passes."""
IDLE_S = 60.0
"""Without a controller for that long it ends; the socket unit starts it again when needed."""
FEED_S = 10.0
BURY_S = 20.0
"""A process that the driver holds on to dies late; the other devices do not wait longer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command ``gpuctld-workers``; the exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C is the controller's business
    manager = Notifier.from_environment()
    if options.connection is not None:
        serve_parent(socket.socket(fileno=options.connection), manager)
    else:
        serve_all(_passed_socket(), manager)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpuctld-workers", description="Forks gpuctld's workers.")
    parser.add_argument("--connection", type=int, help="descriptor of the line to the parent")
    return parser


def _passed_socket() -> socket.socket:
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        sys.exit("gpuctld-workers is started by gpuctld-workers.socket")
    return socket.socket(fileno=LISTEN_FD)


def serve_parent(connection: socket.socket, manager: Notifier) -> None:
    """Serve the controller that started us, and end with it, even during the imports."""
    die_with(_peer(connection)[0])
    preload()
    Nursery(connection, manager).serve()


def serve_all(listener: socket.socket, manager: Notifier) -> None:
    """Serve one controller after the other, until one says that it was the last."""
    preload()
    manager.ready()
    while _wait([listener], manager, IDLE_S):
        connection, _ = listener.accept()
        mine = _peer(connection)[1] == os.geteuid()
        if mine and not Nursery(connection, manager, listener).serve():
            connection.detach()  # the kernel hangs up, when nothing of us is left
            return
        connection.close()


def preload() -> None:
    """Import what workers need. The collector finds nothing in it and costs a fifth of the time."""
    gc.disable()
    importlib.import_module("gpuctld.worker.preload")
    gc.freeze()  # the workers' collections shall neither visit it nor unshare its pages
    gc.enable()


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end; for a pair, who made it."""
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


def _wait(sources: Iterable[Any], manager: Notifier, timeout_s: float | None = None) -> set[Any]:
    """Those that are ready; the watchdog is fed meanwhile."""
    sources = list(sources)
    deadline = time.monotonic() + (timeout_s or float("inf"))
    while (left := deadline - time.monotonic()) > 0:
        manager.watchdog()
        ready = wait(sources, min(FEED_S, left))
        if ready:
            return set(ready)
    return set()


class Nursery:
    """The workers of one controller, each by its pidfd.

    Of an ending process the driver may hold on to memory when its pipes are closed already. A
    pidfd is readable when nothing of it is left, and reaping it does not wait then.
    """

    def __init__(
        self, connection: socket.socket, manager: Notifier, *others: socket.socket
    ) -> None:
        self._connection = connection
        self._manager = manager
        self._ours = (connection, *others)
        self._children: dict[int, tuple[int, BaseProcess]] = {}

    def serve(self) -> bool:
        """Until the controller has gone and its workers with it; whether another may follow."""
        try:
            while True:
                ready = _wait([self._connection, *self._children], self._manager)
                for pidfd in ready & self._children.keys():
                    self._bury(pidfd)
                if self._connection in ready:
                    message, descriptors = self._receive()
                    if not isinstance(message, Fork) or message.version != gpuctl.__version__:
                        return message is None  # told to leave, or of another version: start afresh
                    self._fork(message, socket.socket(fileno=descriptors[0]))
        finally:
            self._end_all()

    def _receive(self) -> tuple[Any, list[int]]:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._connection, MAX_PACKET, 1)
        except ConnectionError:
            return None, []
        return (messages.decode([packet])[0] if packet else None), descriptors

    def _fork(self, request: Fork, channel: socket.socket) -> None:
        from torch import multiprocessing  # noqa: PLC0415  preloaded

        with channel:
            process = multiprocessing.get_context("fork").Process(
                target=self._become,
                args=(request, channel, os.getpid()),
                name=f"gpuctl-worker-{request.gpu}",
            )
            process.start()
        pid = process.pid
        assert pid is not None  # noqa: S101  set by start()
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = request.gpu, process
        self._send(Forked(gpu=request.gpu, pid=pid), pidfd)

    def _become(self, request: Fork, channel: socket.socket, parent: int) -> None:
        """In the child: a worker, whom the kernel ends with its parent whatever it is busy with."""
        die_with(parent)
        for ours in self._ours:
            ours.close()
        module, function = request.main.split(":")
        main = getattr(importlib.import_module(module), function)
        main(WorkerSpec.from_map(request.spec), channel)

    def _bury(self, pidfd: int) -> None:
        gpu, status = self._reap(pidfd)
        self._send(Ended(gpu=gpu, status=status))

    def _reap(self, pidfd: int) -> tuple[int, int | None]:
        """Whose worker it was, and its exit status."""
        gpu, process = self._children.pop(pidfd)
        process.join()
        status = process.exitcode
        process.close()
        os.close(pidfd)
        return gpu, status

    def _end_all(self) -> None:
        for _, process in self._children.values():
            process.kill()
        deadline = time.monotonic() + BURY_S
        while self._children and (left := deadline - time.monotonic()) > 0:
            for pidfd in self._children.keys() & {*wait(list(self._children), left)}:
                self._reap(pidfd)

    def _send(self, message: messages.Forking, *descriptors: int) -> None:
        packet: bytes = messages.encode(message)[0]
        with contextlib.suppress(OSError):  # a controller that is gone is noticed by its socket
            socket.send_fds(self._connection, [packet], descriptors)


if __name__ == "__main__":
    sys.exit(main())
