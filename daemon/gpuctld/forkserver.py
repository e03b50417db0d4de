"""The controller's end of its line to the fork server, :mod:`gpuctld.worker.forkserver`.

Either a child of ours (:func:`launch`) or a service of its own, whose imports outlive us
(:func:`attach`). Both take requests at once and answer when their imports are done.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpuctl.errors import GpuctlError
from gpuctld import messages
from gpuctld.messages import Fork, Leave

MODULE = "gpuctld.worker.forkserver"
MAX_PACKET = 65_536
LEAVE_S = 10.0


class ForkServer:
    """Asks for workers, and hears of their beginnings and ends."""

    def __init__(
        self, connection: socket.socket, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._process = process

    @property
    def descriptor(self) -> int:
        """Readable when there is something to :meth:`receive`."""
        return self._connection.fileno()

    def fork(self, request: Fork, channel: socket.socket) -> None:
        """Ask for a worker; it gets ``channel``."""
        self._send(request, channel.fileno())

    def receive(self) -> Iterator[tuple[Any, list[int]]]:
        """What has come: messages, and the descriptors that came along.

        Raises:
            EOFError: the fork server has ended, and the kernel has killed its workers.
        """
        while True:
            try:
                packet, descriptors, _, _ = socket.recv_fds(self._connection, MAX_PACKET, 1)
            except BlockingIOError:
                return
            except ConnectionError:
                raise EOFError from None
            if not packet:
                raise EOFError
            yield messages.decode([packet])[0], descriptors

    def dismiss(self) -> None:
        """Have a service end too, and wait for it: the next one imports what is there then."""
        if self._process is None:
            self._send(Leave())
            gone = select.poll()
            gone.register(self._connection, select.POLLHUP)
            gone.poll(LEAVE_S * 1000)

    def close(self) -> None:
        """Hang up: it ends our workers. A child is ended as well, and its workers by the kernel."""
        self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _send(self, message: messages.Forking, *descriptors: int) -> None:
        try:
            packet: bytes = messages.encode(message)[0]
            socket.send_fds(self._connection, [packet], descriptors)
        except ConnectionError:  # receive() tells
            return


def launch() -> ForkServer:
    """Start one as our child. From the main thread: the kernel ends it with its starter."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(  # noqa: S603  our own module
            [sys.executable, "-P", "-m", MODULE, "--connection", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            pass_fds=[theirs.fileno()],
        )
    return ForkServer(ours, process)


def attach(path: Path) -> ForkServer:
    """Connect to the one that listens at ``path``.

    Raises:
        GpuctlError: nothing listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(os.fspath(path))
    except OSError as refused:
        connection.close()
        hint = "systemctl status gpuctld-workers.socket"
        raise GpuctlError(f"{path}: no fork server: {refused.strerror}", hint) from None
    return ForkServer(connection)
