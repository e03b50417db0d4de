"""Copies a host copy into a slab in large pieces, and says how far it is."""

from __future__ import annotations

from collections.abc import Callable

import torch

CHUNK_BYTES = 256 * 1024 * 1024

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def copy(source: torch.Tensor, slab: torch.Tensor, progress: Progress) -> None:
    """Copy all bytes of ``source`` into ``slab`` (both uint8, of one length)."""
    total, done = source.numel(), 0
    for here, there in zip(
        torch.split(source, CHUNK_BYTES), torch.split(slab, CHUNK_BYTES), strict=True
    ):
        there.copy_(here)
        done += here.numel()
        progress(done, total)
