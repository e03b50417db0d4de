"""A worker's view of a host copy: the mapped file with weights, skeleton and table."""

from __future__ import annotations

import mmap
import os
import pickle

import torch

from gpuctld import host_store
from gpuctld.weights.layout import Entry, Layout


class Segment:
    """The mapped file of a model's host copy.

    ``slab`` is a uint8 tensor over the weights; it shares memory with every other worker.
    """

    def __init__(self, descriptor: int, slab_bytes: int) -> None:
        self._mapping = mmap.mmap(descriptor, 0)
        self.slab = torch.frombuffer(self._mapping, dtype=torch.uint8, count=slab_bytes)

    @classmethod
    def create(cls, descriptor: int, slab_bytes: int, skeleton: bytes, table: bytes) -> Segment:
        """Size the file, write what stands behind the weights, and seal its size."""
        os.ftruncate(descriptor, slab_bytes + len(skeleton) + len(table))
        os.pwrite(descriptor, skeleton + table, slab_bytes)
        host_store.seal(descriptor)
        return cls(descriptor, slab_bytes)

    def skeleton(self, layout: Layout) -> bytes:
        """The pickled object graph."""
        return self._mapping[layout.slab_bytes : layout.slab_bytes + layout.skeleton_bytes]

    def entries(self, layout: Layout) -> list[Entry]:
        """The table of tensors."""
        table = self._mapping[layout.slab_bytes + layout.skeleton_bytes :]
        entries: list[Entry] = pickle.loads(table)  # noqa: S301  our own file, see skeleton.py
        return entries


def pack_table(entries: list[Entry]) -> bytes:
    """The table as it stands in the file."""
    return pickle.dumps(entries, protocol=5)
