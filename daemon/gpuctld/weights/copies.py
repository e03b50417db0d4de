"""The copies of one reload from host memory to a CUDA slab: queued in order, watched as they land.

They go asynchronously, on a stream of their own, at the link's rate. What is not pinned yet goes
through a small pinned ring.
"""

from __future__ import annotations

from collections import deque

import torch

from gpuctld.weights import driver
from gpuctld.weights.pinning import Pins
from gpuctld.weights.transfer import PIECE_BYTES, Progress, cuts

RING_BYTES = 32 * 1024 * 1024
RING_SLOTS = 4

IN_FLIGHT = 4
"""Copies queued behind the one that runs: the link never waits, and progress stays true."""

Arrival = tuple[int, int, torch.cuda.Event]
"""Start and size of a piece, and the event that tells that it is there."""


class Copies:
    """Copies of one reload, in order; ``path`` says whether all of it was pinned."""

    def __init__(
        self,
        source: torch.Tensor,
        target: int,
        stream: torch.cuda.Stream,
        pins: Pins,
        progress: Progress,
    ) -> None:
        self.path = "pinned"
        self._source, self._target, self._stream = source, target, stream
        self._pins = pins
        self._ring: _Ring | None = None
        self._flying: deque[tuple[int, torch.cuda.Event]] = deque()
        self._done = 0
        self._progress = progress

    def copy(self, start: int, stop: int) -> None:
        """Queue the copies of a span of bytes; may wait for earlier ones, not for these."""
        for at, size in cuts(start, stop):
            self._send(at, size)
            self._land(IN_FLIGHT)

    def queue(self, start: int, stop: int, piece: int) -> list[Arrival]:
        """Queue the copies of a span of bytes in pieces; waits for none that is pinned."""
        return [self._send(at, size) for at, size in cuts(start, stop, piece)]

    def _send(self, at: int, size: int) -> Arrival:
        if self._pins.has(at // PIECE_BYTES * PIECE_BYTES):
            source = self._source.data_ptr() + at
            driver.copy_async(self._target + at, source, size, self._stream.cuda_stream)
        else:
            self._stage(at, size)
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        arrived.record(self._stream)
        self._flying.append((size, arrived))
        return at, size, arrived

    def _stage(self, start: int, size: int) -> None:
        self.path = "staged"
        self._ring = self._ring or _Ring()
        for at, length in cuts(start, start + size, RING_BYTES):
            self._ring.send(self._source[at : at + length], self._target + at, self._stream)

    def _land(self, still_flying: int) -> None:
        while len(self._flying) > still_flying:
            size, arrived = self._flying.popleft()
            arrived.synchronize()
            self._done += size
            self._progress(self._done, self._source.numel())

    def finish(self) -> None:
        """Wait until everything has arrived."""
        self._land(0)
        self._stream.synchronize()


class _Ring:
    """A few pinned buffers through which pageable memory is copied, used in turn."""

    def __init__(self) -> None:
        self._slots = [
            (
                torch.empty(RING_BYTES, dtype=torch.uint8, pin_memory=True),
                torch.cuda.Event(),  # type: ignore[no-untyped-call]
            )
            for _ in range(RING_SLOTS)
        ]
        self._turn = 0

    def send(self, source: torch.Tensor, target: int, stream: torch.cuda.Stream) -> None:
        buffer, sent = self._slots[self._turn]
        self._turn = (self._turn + 1) % RING_SLOTS
        sent.synchronize()
        buffer[: source.numel()].copy_(source)
        driver.copy_async(target, buffer.data_ptr(), source.numel(), stream.cuda_stream)
        sent.record(stream)
