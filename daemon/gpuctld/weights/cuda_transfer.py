"""Host memory to a CUDA slab.

While one piece is copied the next one's memory is created and mapped. Workers that reload the same
model together share the work, see :mod:`gpuctld.weights.fanout`.
"""

from __future__ import annotations

import torch

from gpuctld.weights import fanout
from gpuctld.weights.copies import Copies
from gpuctld.weights.pinning import Pins
from gpuctld.weights.rendezvous import Meeting
from gpuctld.weights.slab import CudaSlab, Slab
from gpuctld.weights.transfer import Progress


class CudaTransfer:
    """Fills one slab from one host copy, which is pinned in the background meanwhile."""

    def __init__(self, source: torch.Tensor, memory: CudaSlab) -> None:
        self._source = source
        self._memory = memory
        self._pins = Pins(source.data_ptr(), source.numel())
        self._stream = torch.cuda.Stream(memory.device)  # type: ignore[no-untyped-call]

    def fill(self, memory: Slab, progress: Progress, meeting: Meeting | None = None) -> str:
        del memory  # the one it was made for
        self._pins.start()
        copies = Copies(self._source, self._memory.address, self._stream, self._pins, progress)
        if meeting is not None:
            return fanout.fill(meeting, self._memory, copies)
        for start, size in self._memory.map():
            copies.copy(start, start + size)
        copies.finish()
        return copies.path

    def pause(self) -> None:
        self._pins.stop()

    def resume(self) -> None:
        self._pins.start()
