"""What the controller and its workers say to each other.

Both ends are ours and of one version, so the classes travel as plain maps without validation:
``[msgpack map with "kind"] [blob]*``. Clients never reach these sockets: they stand in a
directory of mode 0700. The fork server is spoken to alike, one message per packet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import msgpack

# --- commands: controller -> worker ---------------------------------------------------------


@attrs.frozen(kw_only=True)
class LoadModel:
    """Bring a model up to ``tier``; from its ``layout`` in the host store, else from disk."""

    task: str
    source: dict[str, Any]
    layout: dict[str, Any] | None
    tier: str
    adapters: list[dict[str, Any]] = attrs.field(factory=list)
    verify: bool = False


@attrs.frozen(kw_only=True)
class UnloadModel:
    """Free the device of a model; ``tier`` is what remains: ``host`` or ``disk``."""

    task: str
    model: str
    tier: str


@attrs.frozen(kw_only=True)
class Suspend:
    """Give back the CUDA context; the next command that needs the device takes it again."""

    task: str


@attrs.frozen(kw_only=True)
class ReloadModel:
    """Bring a parked model back to the device."""

    task: str
    model: str
    verify: bool = False
    fanout: dict[str, Any] | None = None


@attrs.frozen(kw_only=True)
class RunJob:
    """Run the pipeline once per prompt and seed; input images are the blobs behind the map."""

    task: str
    model: str
    params: dict[str, Any]
    images: dict[str, list[int]]
    seed: int
    count: int
    format: str


@attrs.frozen(kw_only=True)
class ChangeAdapter:
    """Add an adapter at ``scale``, or remove it when ``path`` is ``None``."""

    task: str
    model: str
    adapter: str
    path: str | None
    scale: float = 1.0


@attrs.frozen(kw_only=True)
class CancelTask:
    """Stop the task at its next step."""

    task: str


@attrs.frozen(kw_only=True)
class Probe:
    """Sample the device's memory now."""

    task: str


@attrs.frozen(kw_only=True)
class Stop:
    """Leave."""


# --- events: worker -> controller -----------------------------------------------------------


@attrs.frozen(kw_only=True)
class Hello:
    """The worker is up. ``memory``: ``total``, ``used``, ``free`` in bytes."""

    pid: int
    memory: dict[str, int]


@attrs.frozen(kw_only=True)
class Beat:
    """The worker's process lives; sent by its I/O thread. ``age_s``: of the sample of memory."""

    memory: dict[str, int]
    age_s: float = 0.0


@attrs.frozen(kw_only=True)
class Probed:
    """Answer to :class:`Probe`: memory and the other processes on the device."""

    task: str
    memory: dict[str, int]
    foreign: list[dict[str, Any]]


@attrs.frozen(kw_only=True)
class Progress:
    """``done`` of ``total``: bytes of a move, steps of a job."""

    task: str
    done: int
    total: int


@attrs.frozen(kw_only=True)
class Done:
    """The task succeeded; ``result`` has what its row or reply shows."""

    task: str
    result: dict[str, Any]


@attrs.frozen(kw_only=True)
class Suspended:
    """The worker's context is off the device, which has ``context_bytes`` more."""

    context_bytes: int


@attrs.frozen(kw_only=True)
class Woken:
    """The worker's context is back on the device."""


@attrs.frozen(kw_only=True)
class Failed:
    """The task failed and the worker is in its last true state; ``error`` as on the wire."""

    task: str
    error: dict[str, Any]


@attrs.frozen(kw_only=True)
class Fault:
    """A sticky CUDA error: the task failed and the process leaves.

    ``recovery``: what the driver asks for to make the device usable again; empty for nothing.
    """

    task: str
    error: dict[str, Any]
    recovery: str = ""


# --- controller and fork server --------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Fork:
    """Start a worker. Its channel comes along.

    ``version``: the controller's, which must be the fork server's own. ``main``: the worker's
    entry point, ``module:function``.
    """

    version: str
    gpu: int
    main: str
    spec: dict[str, Any]


@attrs.frozen(kw_only=True)
class Leave:
    """An orderly end: end every worker, then yourself."""


@attrs.frozen(kw_only=True)
class Forked:
    """A worker was started. A pidfd of it comes along."""

    gpu: int
    pid: int


@attrs.frozen(kw_only=True)
class Ended:
    """A worker has ended; ``status`` as ``multiprocessing.Process.exitcode``."""

    gpu: int
    status: int | None


Command = (
    LoadModel
    | UnloadModel
    | Suspend
    | ReloadModel
    | RunJob
    | ChangeAdapter
    | CancelTask
    | Probe
    | Stop
)
Event = Hello | Beat | Probed | Progress | Done | Suspended | Woken | Failed | Fault
Forking = Fork | Leave | Forked | Ended

_KINDS: dict[str, type[Any]] = {
    cls.__name__: cls for union in (Command, Event, Forking) for cls in union.__args__
}


def encode(message: Command | Event | Forking, blobs: Sequence[Any] = ()) -> list[Any]:
    """Frames of a message."""
    fields = attrs.asdict(message, recurse=False)
    return [msgpack.packb({"kind": type(message).__name__, **fields}), *blobs]


def decode(frames: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The message and its blobs."""
    fields = msgpack.unpackb(frames[0])
    return _KINDS[fields.pop("kind")](**fields), list(frames[1:])
