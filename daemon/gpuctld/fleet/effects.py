"""What the fleet decides and asks the controller to do. Plain values; nothing happens here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from gpuctld.messages import Command


@attrs.frozen
class Send:
    """Send a command to a worker."""

    gpu: int
    command: Command
    blobs: Sequence[Any] = ()


@attrs.frozen
class Answer:
    """The one terminal answer to the request ``id``."""

    id: str
    reply: dict[str, Any]
    blobs: Sequence[Any] = ()


@attrs.frozen
class Publish:
    """An event for all subscribers, and for the request ``id`` if its client asked for progress."""

    event: dict[str, Any]
    id: str | None = None


@attrs.frozen
class Spawn:
    """Start the worker of a device."""

    gpu: int


@attrs.frozen
class Signal:
    """Send a signal to a worker's process."""

    gpu: int
    signal: int


@attrs.frozen
class ReleaseCopy:
    """No worker needs the model's host copy any more."""

    model: str


@attrs.frozen
class WatchProcess:
    """Tell the fleet when the process of a lease's holder has ended.

    ``since``: it was there at that monotonic time (seconds); one that began later is another's.
    """

    lease: str
    pid: int
    since: float


@attrs.frozen
class UnwatchProcess:
    """The lease has ended."""

    lease: str


Effect = Send | Answer | Publish | Spawn | Signal | ReleaseCopy | WatchProcess | UnwatchProcess
