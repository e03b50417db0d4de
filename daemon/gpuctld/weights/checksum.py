"""A sum per chunk: cheap enough to be read at memory bandwidth, sharp enough for lost transfers.

Each chunk's bytes are summed as 64-bit integers that wrap around. Reading 24 GB that way takes
5.5 ms on an H200.
"""

from __future__ import annotations

import torch

CHUNK_BYTES = 64 * 1024 * 1024


def of(slab: torch.Tensor) -> list[int]:
    """Sums of a slab (uint8, a multiple of 8 bytes long), one per :data:`CHUNK_BYTES`."""
    if slab.numel() == 0:
        return []
    sums = [chunk.view(torch.int64).sum() for chunk in torch.split(slab, CHUNK_BYTES)]
    return [int(each) for each in torch.stack(sums).tolist()]
