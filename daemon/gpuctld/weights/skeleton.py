"""Takes a loaded pipeline apart into a skeleton and a slab of bytes, and puts it together again.

The skeleton is the pickled object graph with the modules' tensors out of band: pickle calls such
objects persistent. Every parameter and every buffer, saved or not, goes into the slab, and no
family of models needs code of its own. Tensors that share memory (tied weights, views) share it
again afterwards, and their bytes are stored once.

Tensors that hang outside the modules, a scheduler's tables for one, stay on the CPU inside the
skeleton: that is where ``pipeline.to()`` leaves them, and pipelines do arithmetic on them there.

The pickle stays in a file that only the daemon's own processes can open. It never travels over a
socket.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch

from gpuctld.weights.layout import Entry, aligned

WIDEST = 16
"""Bytes of the widest element, complex128. A run begins at a multiple of it, so that elements of
any type in it stay aligned."""


class Unpackable(Exception):
    """The object graph cannot be taken apart; the message says why."""


@attrs.frozen
class Run:
    """Bytes that overlapping tensors of one storage use together, and their place in the slab."""

    storage: torch.UntypedStorage
    start: int
    stop: int
    offset: int


@attrs.frozen
class Plan:
    """Everything needed to write a slab: the runs of bytes, the table, the skeleton."""

    runs: list[Run]
    entries: list[Entry]
    skeleton: bytes
    slab_bytes: int


class _Survey(pickle.Pickler):
    """Walks a graph and notes the tensors that ``Module.to()`` moves."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=5)
        self.moved: set[int] = set()

    def persistent_id(self, value: Any) -> str | None:
        if isinstance(value, torch.nn.Module):
            own = (*value._parameters.values(), *value._buffers.values())  # noqa: SLF001
            self.moved |= {id(tensor) for tensor in own if tensor is not None}
        return "tensor" if isinstance(value, torch.Tensor) else None


class _Collector(pickle.Pickler):
    """Pickles a graph and collects its modules' tensors, each object once."""

    def __init__(self, file: io.BytesIO, moved: set[int]) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[torch.Tensor] = []
        self._moved = moved
        self._index: dict[int, int] = {}

    def persistent_id(self, value: Any) -> tuple[str, int] | None:
        if not isinstance(value, torch.Tensor) or id(value) not in self._moved:
            return None
        if id(value) not in self._index:
            _check_plain(value)
            self._index[id(value)] = len(self.tensors)
            self.tensors.append(value)
        kind = "parameter" if isinstance(value, torch.nn.Parameter) else "tensor"
        return kind, self._index[id(value)]


def _check_plain(tensor: torch.Tensor) -> None:
    if type(tensor) not in {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}:
        raise Unpackable(f"a tensor of type {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise Unpackable(f"a tensor of layout {tensor.layout}")
    if tensor.device.type != "cpu":
        raise Unpackable(f"a tensor on {tensor.device}")
    if tensor.is_conj() or tensor.is_neg():
        raise Unpackable("a lazily conjugated or negated tensor")


def plan(graph: Any) -> Plan:
    """Take a graph apart, without copying any weights yet.

    Raises:
        Unpackable: something in it cannot be pickled, or a tensor is not plain memory.
    """
    file, survey = io.BytesIO(), _Survey()
    collector = _Collector(file, survey.moved)
    try:
        survey.dump(graph)
        collector.dump(graph)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as failed:
        raise Unpackable(f"not picklable: {failed}") from failed
    runs, entries, slab_bytes = place(collector.tensors)
    return Plan(runs, entries, file.getvalue(), slab_bytes)


def place(tensors: Sequence[torch.Tensor]) -> tuple[list[Run], list[Entry], int]:
    """The runs of bytes, the table, and the size of a slab in bytes for some tensors.

    Runs stand in the order of the tensors, which is about the order of execution.
    """
    groups = _overlapping(tensors)
    runs: dict[int, Run] = {}
    offset = 0
    for group in groups:
        start = min(s for s, _, _ in group) // WIDEST * WIDEST
        stop = max(e for _, e, _ in group)
        run = Run(tensors[group[0][2]].untyped_storage(), start, stop, offset)
        runs |= {index: run for _, _, index in group}
        offset = aligned(offset + stop - start)
    entries = [_entry(tensor, runs[index]) for index, tensor in enumerate(tensors)]
    unique = list({id(run): run for run in runs.values()}.values())
    return unique, entries, offset


def _overlapping(tensors: Sequence[torch.Tensor]) -> list[list[tuple[int, int, int]]]:
    """Groups of (start, stop, index) whose bytes overlap within one storage.

    Never a whole storage: a safetensors file is one storage of which each tensor is a slice.
    """
    by_storage: dict[int, list[tuple[int, int, int]]] = {}
    for index, tensor in enumerate(tensors):
        key = tensor.untyped_storage()._cdata  # noqa: SLF001  a storage's identity
        by_storage.setdefault(key, []).append((*_extent(tensor), index))
    groups = [group for spans in by_storage.values() for group in _merge(sorted(spans))]
    return sorted(groups, key=lambda group: min(index for _, _, index in group))


def _merge(spans: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    group, reach = spans[:1], spans[0][1]
    for span in spans[1:]:
        if span[0] < reach:
            group.append(span)
            reach = max(reach, span[1])
        else:
            yield group
            group, reach = [span], span[1]
    yield group


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and end of what a tensor uses of its storage."""
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (int(last) + 1) * size


def _entry(tensor: torch.Tensor, run: Run) -> Entry:
    start, _ = _extent(tensor)
    return Entry(
        offset=run.offset + start - run.start,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=list(tensor.shape),
        stride=list(tensor.stride()),
        requires_grad=tensor.requires_grad,
    )


def copy_runs(runs: list[Run], slab: torch.Tensor, progress: Callable[[int], None]) -> None:
    """Copy weights into a slab (uint8, one dimension), from any device; reports bytes."""
    for run in runs:
        size = run.stop - run.start
        empty = torch.empty(0, dtype=torch.uint8, device=run.storage.device)
        source = empty.set_(run.storage, run.start, [size], [1])
        slab[run.offset : run.offset + size].copy_(source)
        progress(size)


class _Assembler(pickle.Unpickler):
    """Unpickles a skeleton with tensors that are views of a slab."""

    def __init__(self, skeleton: bytes, entries: list[Entry], slab: torch.Tensor) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._entries, self._slab = entries, slab
        self._made: dict[tuple[str, int], torch.Tensor] = {}

    def persistent_load(self, pid: tuple[str, int]) -> torch.Tensor:
        if pid not in self._made:
            self._made[pid] = self._make(*pid)
        return self._made[pid]

    def _make(self, kind: str, index: int) -> torch.Tensor:
        entry = self._entries[index]
        view = view_of(self._slab, entry)
        if kind == "parameter":
            return torch.nn.Parameter(view, requires_grad=entry.requires_grad)
        return view.requires_grad_(entry.requires_grad)


def view_of(slab: torch.Tensor, entry: Entry) -> torch.Tensor:
    """A tensor of the table as a view of the slab."""
    dtype = getattr(torch, entry.dtype)
    start = slab.storage_offset() + entry.offset
    empty = torch.empty(0, dtype=dtype, device=slab.device)
    return empty.set_(slab.untyped_storage(), start // dtype.itemsize, entry.shape, entry.stride)


def assemble(skeleton: bytes, entries: list[Entry], slab: torch.Tensor) -> Any:
    """The object graph again, its tensors views of ``slab`` (uint8, on any device)."""
    return _Assembler(skeleton, entries, slab).load()
