"""One request and its answer, without any I/O: what both clients share.

A conversation says what to send and what an incoming message means for it. It also knows what a
restarted daemon means: a load, unload, reload or lease is a wish and safe to send again; a
generation is run at most once, so its loss is told instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpuctl import errors, protocol
from gpuctl.errors import NoDaemon, WorkerLost
from gpuctl.paths import holder, permitted
from gpuctl.protocol import Request

SILENCE_S = 6.0
"""The daemon sends a sign of life every two seconds; after three missed ones it is looked for."""

RUN_ONCE = frozenset({"generate"})

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Reply:
    """A terminal answer: its map and its blobs."""

    fields: dict[str, Any]
    blobs: list[bytes]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def raise_for_error(self) -> Reply:
        """This reply, if all went well.

        Raises:
            GpuctlError: the class that belongs to the reply's code; ``reply`` holds this reply.
        """
        if self.fields["ok"]:
            return self
        error = errors.from_map(self.fields["error"])
        error.reply = self
        raise error


@dataclass
class Conversation:
    """A request under way."""

    request: Request
    blobs: Sequence[Any] = ()
    on_event: OnEvent | None = None
    epoch: str | None = None
    reply: Reply | None = None

    def frames(self) -> list[Any]:
        """What to send, the first time and again."""
        return protocol.encode(self.request, self.blobs)

    def take(self, frames: Sequence[Any]) -> None:
        """An incoming message; sets ``reply`` when it is the answer."""
        fields, blobs = protocol.decode_reply(frames)
        if fields.get("id") != self.request.id:
            return
        if "ok" in fields:
            self.reply = Reply(fields, blobs)
        elif self.on_event is not None and "event" in fields:
            self.on_event(fields)

    def found_daemon(self, epoch: str) -> None:
        """The daemon answers again after a silence.

        Raises:
            WorkerLost: it has restarted and the request must not run twice.
        """
        if self.epoch not in {None, epoch} and self.request.op in RUN_ONCE:
            raise WorkerLost("the daemon has restarted under the request", "ask again")
        self.epoch = epoch


def no_daemon(endpoint: str) -> NoDaemon:
    """Nobody answers, or only to others."""
    if endpoint.startswith("tcp://"):
        hint = "is it up, is GPUCTL_SERVER_KEY its key, and is yours in its [tcp.clients]?"
        return NoDaemon(f"no gpuctld answers on {endpoint}", hint)
    if not permitted(endpoint):
        hint = "the system service is for members of group gpuctl; join it and log in again"
        return NoDaemon(f"no permission to use {endpoint}", hint)
    pid = holder(endpoint)
    if pid is not None:
        hint = f"pid {pid} serves it but is starting, stopping, stopped or out of descriptors"
        return NoDaemon(f"no gpuctld answers on {endpoint}", hint)
    return NoDaemon(f"no gpuctld answers on {endpoint}", "start it: gpuctl serve")
