"""The controller's end of the workers' sockets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import zmq

from gpuctld import messages

TURN = 256
READ_BYTES = 8192
"""What libzmq reads at once (ZMQ_IN_BATCH_SIZE)."""


class Links:
    """One DEALER per worker. A worker that does not read never blocks the controller."""

    def __init__(self, context: zmq.Context[Any], endpoints: dict[int, str]) -> None:
        self._context = context
        self._endpoints = endpoints
        self._sockets: dict[int, zmq.Socket[bytes]] = {}

    def open(self, gpu: int) -> None:
        """A fresh connection for a fresh worker: what the old one had not read is gone."""
        self.close(gpu)
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDTIMEO, 0)
        socket.set(zmq.RECONNECT_IVL, 10)
        socket.connect(self._endpoints[gpu])
        self._sockets[gpu] = socket

    def close(self, gpu: int) -> None:
        """Drop the connection to a worker that has ended."""
        socket = self._sockets.pop(gpu, None)
        if socket is not None:
            socket.close()

    def sockets(self) -> dict[zmq.Socket[bytes], int]:
        """All connections, and whose they are."""
        return {socket: gpu for gpu, socket in self._sockets.items()}

    def send(self, gpu: int, command: messages.Command, blobs: Sequence[Any]) -> None:
        """Hand a command over; a worker that is gone is noticed by its end."""
        socket = self._sockets.get(gpu)
        if socket is None:
            return
        try:
            socket.send_multipart(messages.encode(command, blobs), zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return

    def receive(self, gpu: int) -> Iterator[tuple[Any, list[Any]]]:
        """What a worker has said: messages and their blobs, at most :data:`TURN`."""
        for _ in range(TURN):
            socket = self._sockets.get(gpu)
            if socket is None:
                return
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            yield messages.decode([frames[0].buffer, *map(_by_itself, frames[1:])])

    def close_all(self) -> None:
        """Drop all connections."""
        for gpu in list(self._sockets):
            self.close(gpu)


def _by_itself(frame: zmq.Frame) -> zmq.Frame | bytes:
    """A frame that may be kept: a small one is a view of the whole buffer that it was read with."""
    return frame if len(frame) > READ_BYTES else frame.bytes
