"""The worker's end of its socket, on a thread of its own.

The main thread computes. This one answers while it does: beats, memory probes, cancellation.
ZeroMQ sockets are not shared between threads, so the main thread hands its events over an
in-process socket pair.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import zmq

from gpuctld import messages
from gpuctld.messages import Beat, CancelTask, Probe, Probed
from gpuctld.weights import Gauge

BEAT_S = 1.0
LAST_WORDS_MS = 1_000


class Link(threading.Thread):
    """Receives commands into ``inbox``; sends events from any one thread through ``send``."""

    def __init__(self, endpoint: str, gauge: Gauge) -> None:
        super().__init__(name="link", daemon=True)
        self.inbox: queue.SimpleQueue[tuple[Any, list[Any]]] = queue.SimpleQueue()
        self._endpoint = endpoint
        self._gauge = gauge
        self._context = zmq.Context()
        self._cancelled: set[str] = set()
        self._outlet = self._context.socket(zmq.PAIR)
        self._intake = self._context.socket(zmq.PAIR)
        self._intake.bind("inproc://events")
        self._outlet.connect("inproc://events")

    def send(self, event: messages.Event, blobs: Sequence[Any] = ()) -> None:
        """Send an event to the controller. For the main thread."""
        self._outlet.send_multipart(messages.encode(event, blobs))

    def is_cancelled(self, task: str) -> bool:
        """Whether the controller has asked to stop this task."""
        return task in self._cancelled

    def close(self) -> None:
        """Deliver what was sent and end the thread. For the main thread."""
        self._outlet.send_multipart([b""])
        self.join(LAST_WORDS_MS / 1000)

    def run(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, LAST_WORDS_MS)
        socket.bind(self._endpoint)
        try:
            self._serve(socket)
        finally:
            socket.close()

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._intake, zmq.POLLIN)
        next_beat = time.monotonic()
        while True:
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_S
                beat = Beat(memory=self._gauge.memory(), age_s=self._gauge.age_s)
                socket.send_multipart(messages.encode(beat))
            ready = dict(poller.poll(max(0, int((next_beat - time.monotonic()) * 1000))))
            if self._intake in ready:
                frames = self._intake.recv_multipart(copy=False)
                if len(frames) == 1 and not frames[0].bytes:
                    return
                socket.send_multipart(frames, copy=False)
            if socket in ready:
                self._take(socket)

    def _take(self, socket: zmq.Socket[bytes]) -> None:
        frames = socket.recv_multipart(copy=False)
        command, blobs = messages.decode([frames[0].buffer, *frames[1:]])
        match command:
            case CancelTask():
                self._cancelled.add(command.task)
            case Probe():
                memory, foreign = self._gauge.memory(), self._gauge.foreign()
                answer = Probed(task=command.task, memory=memory, foreign=foreign)
                socket.send_multipart(messages.encode(answer))
            case _:
                self.inbox.put((command, blobs))
