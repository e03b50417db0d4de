"""What happens to the fleet. The controller turns sockets, signals and clocks into these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Peer:
    """Who sent a request: process and user on this host; ``pid`` 0 where it is not known."""

    pid: int = 0
    uid: int = -1


@attrs.frozen(kw_only=True)
class Requested:
    """A client asks, with one of ``gpuctl.protocol``; ``client`` names its connection."""

    request: Any
    client: bytes
    peer: Peer
    blobs: Sequence[Any] = ()


@attrs.frozen
class ClientGone:
    """A client's connection or process has ended."""

    client: bytes


@attrs.frozen
class Heard:
    """A worker said something: one of the events of ``gpuctld.messages``."""

    gpu: int
    message: Any
    blobs: Sequence[Any] = ()


@attrs.frozen
class Spawned:
    """A worker's process was started."""

    gpu: int
    pid: int


@attrs.frozen
class Died:
    """A worker's process has ended; ``reason`` says how, in words."""

    gpu: int
    reason: str


@attrs.frozen
class HolderDied:
    """The process that holds a lease has ended."""

    lease: str


@attrs.frozen
class Booted:
    """The daemon starts; ``snapshot``: what it remembers (:mod:`gpuctld.fleet.snapshot`)."""

    snapshot: Any


@attrs.frozen
class Reconfigured:
    """A new catalog and new phases."""

    catalog: Any
    phases: dict[str, Any]


@attrs.frozen
class Stopping:
    """No new work; finish or cancel what runs."""


@attrs.frozen
class Tick:
    """Time has passed."""


Event = (
    Requested
    | ClientGone
    | Heard
    | Spawned
    | Died
    | HolderDied
    | Booted
    | Reconfigured
    | Stopping
    | Tick
)
