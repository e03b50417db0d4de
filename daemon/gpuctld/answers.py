"""One terminal answer per request: who waits for which id, and what was answered before.

A client that lost its connection sends the same request with the same id again. If the request is
still under way it is attached to it; if it was answered, it gets the recorded answer; it is never
run twice. The record is bounded in time, number and bytes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import attrs

from gpuctl.errors import BadRequest

KEPT_S = 600.0
KEPT_ANSWERS = 10_000
KEPT_BYTES = 256 * 1024 * 1024


@attrs.frozen
class Caller:
    """A connection, and whether it is a REQ socket that wants its empty delimiter back."""

    client: bytes
    delimited: bool


@attrs.define
class _Pending:
    digest: bytes
    callers: list[Caller]
    wants_progress: bool


@attrs.frozen
class _Settled:
    digest: bytes
    frames: Sequence[Any]
    size: int
    at: float


class Answers:
    """The record of requests by id."""

    def __init__(self) -> None:
        self._pending: dict[str, _Pending] = {}
        self._settled: OrderedDict[str, _Settled] = OrderedDict()
        self._bytes = 0

    def admit(
        self, id_: str, body: bytes, caller: Caller, *, progress: bool
    ) -> Sequence[Any] | bool:
        """What to do with a request: run it (``True``), nothing (``False``), or send these frames.

        Raises:
            BadRequest: the id was used for another request.
        """
        digest = hashlib.blake2b(body, digest_size=16).digest()
        settled, pending = self._settled.get(id_), self._pending.get(id_)
        known = settled or pending
        if known is not None and known.digest != digest:
            raise BadRequest(f"the id {id_!r} was used for another request", "use a fresh id")
        if settled is not None:
            return settled.frames
        if pending is not None:
            if caller not in pending.callers:
                pending.callers.append(caller)
            return False
        self._pending[id_] = _Pending(digest, [caller], progress)
        return True

    def settle(self, id_: str, frames: Sequence[Any], now: float) -> list[Caller]:
        """Record the answer; the callers that wait for it."""
        pending = self._pending.pop(id_, None)
        if pending is None:
            return []
        size = sum(len(frame) for frame in frames)
        self._settled[id_] = _Settled(pending.digest, frames, size, now)
        self._bytes += size
        self._forget_old(now)
        return pending.callers

    def watchers(self, id_: str) -> list[Caller]:
        """Callers of an unanswered request who asked for its progress."""
        pending = self._pending.get(id_)
        return pending.callers if pending is not None and pending.wants_progress else []

    def waiting(self) -> set[bytes]:
        """Connections that wait for an answer."""
        return {caller.client for each in self._pending.values() for caller in each.callers}

    def delimited(self, client: bytes) -> bool:
        """Whether a waiting connection is a REQ socket, which takes nothing but its answer."""
        callers = (caller for each in self._pending.values() for caller in each.callers)
        return any(caller.client == client and caller.delimited for caller in callers)

    def drop_client(self, client: bytes) -> None:
        """Forget a connection; its requests go on and their answers are recorded."""
        for pending in self._pending.values():
            pending.callers = [each for each in pending.callers if each.client != client]

    def _forget_old(self, now: float) -> None:
        while self._settled and self._is_too_much(now):
            _, oldest = self._settled.popitem(last=False)
            self._bytes -= oldest.size

    def _is_too_much(self, now: float) -> bool:
        oldest = next(iter(self._settled.values()))
        late = now - oldest.at > KEPT_S
        return late or len(self._settled) > KEPT_ANSWERS or self._bytes > KEPT_BYTES
