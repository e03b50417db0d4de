"""How a model's tensors lie in its slab: one table that all workers share."""

from __future__ import annotations

from typing import Any

import attrs

ALIGNMENT = 512
"""Bytes; what cudaMalloc guarantees is 256, and wide vector loads like more."""


@attrs.frozen
class Entry:
    """One tensor: a view of the slab.

    ``offset`` in bytes; ``shape`` and ``stride`` in elements of ``dtype``.
    """

    offset: int
    dtype: str
    shape: list[int]
    stride: list[int]
    requires_grad: bool = False


@attrs.frozen(kw_only=True)
class Layout:
    """A packed model: the slab, the table of its tensors, and where the skeleton is.

    The host copy is one file: ``slab_bytes`` of weights, then ``skeleton_bytes`` of the pickled
    object graph that refers to the weights by their index in the table, then the table itself.
    ``checksums``: one per chunk of the slab, see :mod:`gpuctld.weights.checksum`.
    """

    model: str
    pipeline: str
    dtype: str
    slab_bytes: int
    skeleton_bytes: int
    checksums: list[int]

    def to_map(self) -> dict[str, Any]:
        """For a message."""
        return attrs.asdict(self)

    @classmethod
    def from_map(cls, fields: dict[str, Any]) -> Layout:
        """From a message."""
        return cls(**fields)


def aligned(offset: int) -> int:
    """The next multiple of :data:`ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
