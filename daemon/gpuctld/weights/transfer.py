"""Copies a host copy into a slab in large pieces, and says how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from gpuctld.weights.rendezvous import Meeting
from gpuctld.weights.slab import Slab

PIECE_BYTES = 256 * 1024 * 1024
"""Of one copy. Pinned pieces are as large, and a copy must not straddle two of them."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class Transfer(Protocol):
    """Brings the bytes of one host copy into a slab."""

    def fill(self, memory: Slab, progress: Progress, meeting: Meeting | None = None) -> str:
        """Map the slab and copy everything; returns the way that the bytes took.

        Workers of one ``meeting`` share the work where their devices can.
        """

    def pause(self) -> None:
        """Let go of pinned host memory, if there is any."""

    def resume(self) -> None:
        """Take it again, in the background."""


def cuts(start: int, stop: int, piece: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Start and size of the pieces of a span, cut at every multiple of ``piece`` bytes."""
    while start < stop:
        end = min(stop, (start // piece + 1) * piece)
        yield start, end - start
        start = end


class PlainTransfer:
    """Copies with torch, one piece after the other."""

    def __init__(self, source: torch.Tensor) -> None:
        self._source = source

    def fill(self, memory: Slab, progress: Progress, meeting: Meeting | None = None) -> str:
        del meeting  # without peer access each copies for itself
        total = self._source.numel()
        for start, size in memory.map():
            for at, length in cuts(start, start + size):
                memory.tensor[at : at + length].copy_(self._source[at : at + length])
                progress(at + length, total)
        return "memcpy"

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass
