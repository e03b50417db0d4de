"""The socket that clients reach: a ROUTER with bounds on everything that comes in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import zmq

from gpuctl import protocol
from gpuctl.errors import BadConfig, BadRequest
from gpuctld import logs
from gpuctld.entrances import DescriptorGuard, Entrance, IpcEntrance
from gpuctld.fleet.events import Peer
from gpuctld.remote import Remote, TcpEntrance

log = logging.getLogger(__name__)

IPC = "ipc://"
HANDSHAKE_MS = 2_000
QUEUE = 1_000
"""Answers and events that wait for a client; what goes beyond is dropped."""
TURN = 64
"""Messages taken in one turn of the loop, so that a flood does not starve the workers; no more of
one client's wait in memory, so that large ones cannot fill it."""
MAX_PARTS = 4 + protocol.MAX_BLOBS
"""Connection, delimiter, version and map stand before the blobs."""


@attrs.frozen
class Incoming:
    """A message from a client: its connection, its user and process, its frames."""

    client: bytes
    peer: Peer
    delimited: bool
    frames: Sequence[Any]


class Door:
    """Binds the client socket and moves whole messages; knows nothing of what they mean."""

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, remote: Remote | None = None
    ) -> None:
        path = bindable(endpoint)
        self.endpoint = endpoint
        self.refused = 0
        self.socket = context.socket(zmq.ROUTER)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self.socket.set(zmq.SNDTIMEO, 0)
        self.socket.set(zmq.LINGER, 500)
        self.socket.set(zmq.SNDHWM, QUEUE)
        self.socket.set(zmq.RCVHWM, TURN)
        self.socket.set(zmq.MAXMSGSIZE, protocol.MAX_BLOB_BYTES)
        self.socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self._skipping = False
        self._entrances: list[Entrance] = [IpcEntrance(self.socket, path)]
        if remote is not None:
            self._entrances.append(TcpEntrance(self.socket, context, remote))
        self._guard = DescriptorGuard(self.socket, self._entrances)

    @property
    def sources(self) -> list[zmq.Socket[Any]]:
        """Readable when there is something to :meth:`receive`."""
        return [self.socket, self._guard.monitor]

    @property
    def problem(self) -> str | None:
        """Why nobody can connect at the moment."""
        if not self._guard.shut:
            return None
        return f"no new connections: more than {self._guard.limit} descriptors are open"

    def receive(self) -> Iterator[Incoming]:
        """What has arrived, at most :data:`TURN` messages."""
        for _ in range(TURN):
            self._guard.look()
            try:
                frames = self._parts()
            except zmq.Again:
                return
            incoming = self._accept(frames) if frames else None
            if incoming is not None:
                yield incoming

    def _parts(self) -> list[zmq.Frame]:
        """One message; nothing for a piece of one that has too many parts.

        libzmq bounds a frame, not their number. Such a message is thrown away piece by piece, so
        that the loop goes on with other things meanwhile; other clients' messages come behind it
        (4.5 us a part).
        """
        frames: list[zmq.Frame] = []
        while len(frames) < MAX_PARTS:
            frames.append(self.socket.recv(zmq.DONTWAIT, copy=False))
            if not frames[-1].more:
                skipped, self._skipping = self._skipping, False
                return [] if skipped else frames
        self.refused += not self._skipping
        self._skipping = True
        return []

    def _accept(self, frames: list[zmq.Frame]) -> Incoming | None:
        client, *rest = frames
        delimited = bool(rest) and len(rest[0]) == 0
        body = rest[1:] if delimited else rest
        total = sum(len(frame) for frame in body)
        too_much = len(body) > 2 + protocol.MAX_BLOBS or total > protocol.MAX_MESSAGE_BYTES
        if too_much or len(body) < 2 or body[0].bytes != protocol.VERSION:
            self.refused += 1
            return None
        return Incoming(client.bytes, _peer(body[0]), delimited, body)

    def send(self, client: bytes, frames: Sequence[Any], *, delimited: bool) -> bool:
        """Hand a message over without ever blocking; false when the client is gone or stuck."""
        envelope = [client, b""] if delimited else [client]
        try:
            self.socket.send_multipart([*envelope, *frames], zmq.DONTWAIT, copy=False)
        except zmq.ZMQError:
            return False
        return True

    def has_lost(self, client: bytes, frames: Sequence[Any]) -> bool:
        """Whether the connection has ended; finds out by sending ``frames``."""
        try:
            self.socket.send_multipart([client, *frames], zmq.DONTWAIT, copy=False)
        except zmq.Again:  # alive, but it does not read
            return False
        except zmq.ZMQError as error:
            return error.errno == zmq.EHOSTUNREACH
        return False

    def close(self) -> None:
        """Close the socket and remove its files."""
        self._guard.close()
        self.socket.close()
        for entrance in self._entrances:
            entrance.close()


def _peer(frame: zmq.Frame) -> Peer:
    """User and process behind an ipc connection; libzmq notes ``host:uid:gid:pid``.

    An IPv6 address could look the same, so a connection with a key has neither.
    """
    if _has_key(frame):
        return Peer()
    try:
        _, uid, _, pid = str(frame.get("Peer-Address")).rsplit(":", 3)
        return Peer(pid=int(pid), uid=int(uid))
    except (zmq.ZMQError, ValueError):
        return Peer()


def _has_key(frame: zmq.Frame) -> bool:
    try:
        return bool(frame.get("User-Id"))
    except zmq.ZMQError:
        return False


def bindable(endpoint: str) -> Path:
    """The path to bind for clients.

    Raises:
        BadConfig: it is no ipc endpoint, or longer than the kernel takes.
    """
    if not endpoint.startswith(IPC):
        raise BadConfig(f"{endpoint}: only ipc:// sockets are served")
    path = Path(endpoint.removeprefix(IPC))
    if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
        limit = f"a socket's path has at most {zmq.IPC_PATH_MAX_LEN} bytes"
        raise BadConfig(f"{path} is too long: {limit}", "name a shorter one with --socket")
    return path


def read(incoming: Incoming) -> tuple[Any, bytes, list[Any]]:
    """The typed request of a message, the bytes of its map, and its blobs.

    Raises:
        BadRequest: with the request's id in ``args`` of the message where it can be read.
    """
    body = incoming.frames[1].bytes
    try:
        request = protocol.request_from_map(protocol.decode_map(body))
    except BadRequest:
        raise
    except Exception as bug:  # strangers' bytes must not end the daemon, whatever we overlooked
        log.exception("request_not_understood", extra=logs.fields(body=body[:256].hex()))
        raise BadRequest("not understood, which is a bug: please report it") from bug
    return request, body, list(incoming.frames[2:])


def readable_id(incoming: Incoming) -> str | None:
    """The id of a message whose request is refused, if it has one at all."""
    try:
        id_ = protocol.decode_map(incoming.frames[1].bytes).get("id")
    except BadRequest:
        return None
    return id_ if isinstance(id_, str) and len(id_) <= 64 else None


def private_directory(path: Path, mode: int) -> None:
    """Make a directory that only its owner (and, by ``mode``, its group) can enter."""
    path.mkdir(parents=True, exist_ok=True)
    if path.stat().st_uid == os.geteuid():
        path.chmod(mode)
