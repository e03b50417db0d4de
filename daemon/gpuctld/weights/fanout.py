"""Several GPUs reload one model: each pulls a share over its own link and pushes it to the others.

With N GPUs the host memory is read once instead of N times, and NVLink, several times faster than
PCIe, carries the rest: 24 GB reach both of two H200 in 0.226 s (106 GB/s each, where one PCIe link
gives 55). The pushes go by plain copies into memory that the peer has exported; no multicast.

Every rank writes the same bytes to the same places, so a late push into a slab that its owner has
already completed by itself changes nothing: whoever misses a share just copies it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time

import torch

from gpuctl.errors import GpuctlError
from gpuctld.weights import driver, rendezvous
from gpuctld.weights.copies import Arrival, Copies
from gpuctld.weights.rendezvous import Link, Meeting
from gpuctld.weights.slab import CudaSlab

PIECE_BYTES = 64 * 1024 * 1024
"""A piece is pushed on when it has arrived; 32 to 512 MiB measured alike."""

SHARE_UNIT = 64 * 1024

DONE, FAILED = b"done", b"failed"

SLOWEST = 2e9
"""Bytes per second. A peer slower than that is not waited for."""


def fill(meeting: Meeting, memory: CudaSlab, copies: Copies) -> str:
    """Map the slab and fill it together with the peers; returns the way that the bytes took.

    Our share is on its way while the rest is mapped and the peers are met. Leaves when every
    peer's share has arrived and every push has landed. Shares of peers that are missing, failed,
    or cannot reach this GPU are copied from the host.
    """
    spans = shares(memory.size, meeting.world)
    arrivals = _queue_share(spans[meeting.rank], memory, copies)
    with contextlib.ExitStack() as stack:
        peers = _gather(meeting, memory, spans[meeting.rank], stack)
        pushes = _Pushes(peers, memory)
        stack.callback(pushes.wait)  # also after a failure: peers' memory is unmapped next
        for arrival in arrivals:
            pushes.push(*arrival)
        copies.finish()
        pushes.finish()
        deadline = time.monotonic() + 1 + memory.size / SLOWEST
        delivered = {peer.rank for peer in peers if peer.has_delivered(deadline)}
    missing = [rank for rank in range(meeting.world) if rank not in {*delivered, meeting.rank}]
    for rank in missing:
        copies.copy(*spans[rank])
    copies.finish()
    return copies.path if missing else "fanout"


def _queue_share(span: tuple[int, int], memory: CudaSlab, copies: Copies) -> list[Arrival]:
    """Map the slab, our share of it first, and queue the copies of what is ours."""
    first, last = span
    return [
        arrival
        for start, size in memory.map(first)
        for arrival in copies.queue(max(first, start), min(last, start + size), PIECE_BYTES)
    ]


def shares(size: int, world: int) -> list[tuple[int, int]]:
    """Start and stop of each rank's share, in bytes; together all of it."""
    units = -(-size // SHARE_UNIT)
    edges = [min(size, units * rank // world * SHARE_UNIT) for rank in range(world + 1)]
    return list(itertools.pairwise(edges))


def _gather(
    meeting: Meeting, memory: CudaSlab, span: tuple[int, int], stack: contextlib.ExitStack
) -> list[Peer]:
    shown = memory.export()
    try:
        links = rendezvous.meet(meeting, shown)
    finally:
        for descriptor, _ in shown:
            os.close(descriptor)
    peers = [Peer(link, memory.device, span) for link in links]
    for peer in peers:
        stack.callback(peer.close)
    return peers


class Peer:
    """Another worker's slab, if this GPU can reach it: mapped here where ``span`` is pushed to."""

    def __init__(self, link: Link, device: int, span: tuple[int, int]) -> None:
        self.rank = link.rank
        self._link = link
        self._size = sum(size for _, size in link.memory)
        self._mapped: list[tuple[int, int, object]] = []
        self.address = driver.reserve(self._size)
        self.reachable = self._map(device, span)

    def _map(self, device: int, span: tuple[int, int]) -> bool:
        """Only what is written to: unmapping all of it again would make the reload wait."""
        first, last = span
        start = 0
        try:
            for descriptor, size in self._link.memory:
                if start < last and first < start + size:
                    self._map_piece(self.address + start, size, descriptor, device)
                start += size
        except GpuctlError:
            return False  # no peer access between the two GPUs
        return True

    def _map_piece(self, at: int, size: int, descriptor: int, device: int) -> None:
        handle = driver.import_memory(descriptor)
        try:
            driver.map_at(at, size, handle, device)
        except GpuctlError:
            driver.release(handle)
            raise
        self._mapped.append((at, size, handle))

    def tell(self, word: bytes) -> None:
        """Say whether our share is in the peer's slab."""
        with contextlib.suppress(OSError):
            self._link.connection.send(word)

    def has_delivered(self, deadline: float) -> bool:
        """Wait for the peer's word about its share."""
        self._link.connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            return self._link.connection.recv(len(FAILED)) == DONE
        except OSError:
            return False

    def close(self) -> None:
        for at, size, handle in self._mapped:
            driver.unmap(at, size)
            driver.release(handle)
        driver.free_addresses(self.address, self._size)
        self._link.close()


class _Pushes:
    """Copies from our slab to the peers', each piece as soon as it has arrived in ours."""

    def __init__(self, peers: list[Peer], memory: CudaSlab) -> None:
        self._peers, self._own = peers, memory.address
        self._stream = torch.cuda.Stream(memory.device)  # type: ignore[no-untyped-call]

    def push(self, start: int, size: int, arrived: torch.cuda.Event) -> None:
        self._stream.wait_event(arrived)
        for peer in self._peers:
            if peer.reachable:
                target, source = peer.address + start, self._own + start
                driver.copy_async(target, source, size, self._stream.cuda_stream)

    def wait(self) -> None:
        self._stream.synchronize()

    def finish(self) -> None:
        """Wait until all pushes have landed, and tell every peer."""
        self.wait()
        for peer in self._peers:
            peer.tell(DONE if peer.reachable else FAILED)
