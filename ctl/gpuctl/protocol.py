"""The wire protocol: every message that a client can send, and the frame layout.

A message is a ZeroMQ multipart message::

    [b"gpuctl/1"] [msgpack map] [blob]*

A client may put one empty delimiter frame in front, as a REQ socket does; the answer then starts
with one too. Images and other large bytes travel as blobs and the map refers to them by index.
``docs/protocol.md`` says the same for readers who write a client in another language.

This module is the single place where messages are defined: both sides import it. Requests are
plain classes; the daemon refuses unknown fields. Replies and events are maps, and a client
ignores fields that it does not know.

The client's classes are dataclasses, not attrs as the daemon's, and those here are bare ones: a
command spends most of its time on imports. attrs would take a seventh of that, and the methods that
are left out (equality, text, guards against writing) a tenth.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, dataclass_transform, get_args

import msgpack

from gpuctl.errors import BadRequest

if TYPE_CHECKING:
    from cattrs.preconf.msgpack import MsgpackConverter

VERSION = b"gpuctl/1"
SCHEMA = 1

MAX_MAP_BYTES = 64 * 1024
MAX_BLOBS = 64
MAX_BLOB_BYTES = 256 * 1024 * 1024
MAX_MESSAGE_BYTES = 512 * 1024 * 1024
MAX_ITEMS = 10_000
MAX_DEPTH = 16

Mode = Literal["wait", "abort"]
OnParked = Literal["refuse", "wait", "reload"]
ImageFormat = Literal["png", "webp", "raw"]

MAX_ID = 64
MAX_SEED = 2**63 - 1

T = TypeVar("T")


def new_id() -> str:
    """A fresh request id: 16 random bytes as 32 hexadecimal digits."""
    return os.urandom(16).hex()


def _within(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{what} is {value}; {least} to {most} are allowed")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def _message(cls: type[T]) -> type[T]:
    """A message has keywords and is never changed; that the type checker sees to."""
    return dataclass(kw_only=True, eq=False, repr=False)(cls)


@_message
class Request:
    """What every request carries. ``id`` is chosen by the client and repeated in every answer.

    Raises:
        ValueError: a value that no request of that kind may have.
    """

    op: ClassVar[str]
    id: str = field(default_factory=new_id)

    def __post_init__(self) -> None:
        _within("length of id", len(self.id), 1, MAX_ID)


@_message
class Ping(Request):
    """Are you there? Answers version, protocol and boot epoch."""

    op = "ping"


@_message
class Status(Request):
    """The whole state: daemon, workers, models, leases, jobs."""

    op = "status"


@_message
class Models(Request):
    """The catalog."""

    op = "models"


@_message
class Load(Request):
    """Bring ``model`` onto its GPUs.

    ``serial``: one worker after the other; ``None`` chooses: in sequence for a first load from
    disk, all at once where the weights are parked. ``wait_s``: how long to wait for memory that
    others hold. ``force``: also on GPUs that are leased; the answer's ``forced`` says to whom.
    """

    op = "load"
    model: str
    gpus: list[int] | None = None
    serial: bool | None = None
    fail_fast: bool = False
    verify: bool = False
    fanout: bool = True
    force: bool = False
    wait_s: float = 0.0
    timeout_s: float | None = None
    progress: bool = False


@_message
class Unload(Request):
    """Free the GPUs of ``model`` (all models when ``None``), all workers at once.

    ``to``: the tier that keeps the weights. ``mode``: let running jobs finish, or abort them.
    ``suspend``: give back the CUDA context's memory as well.
    """

    op = "unload"
    model: str | None = None
    gpus: list[int] | None = None
    to: Literal["host", "disk"] = "host"
    mode: Mode = "wait"
    suspend: bool = False
    timeout_s: float | None = None
    progress: bool = False


@_message
class Reload(Request):
    """Bring parked weights back, all workers at once unless ``serial``.

    ``verify`` compares a checksum of the weights on the device. ``fanout``: let GPUs share the
    host link and exchange the halves among themselves where they can.
    """

    op = "reload"
    model: str | None = None
    gpus: list[int] | None = None
    serial: bool = False
    verify: bool = False
    fanout: bool = True
    force: bool = False
    wait_s: float = 0.0
    timeout_s: float | None = None
    progress: bool = False


@_message
class Generate(Request):
    """Run the model's pipeline once per prompt and seed.

    ``params`` are the pipeline's own call parameters. ``images`` maps a parameter to the blobs
    that are its input image or images. Image ``k`` uses ``seed + k``; without a seed the daemon
    draws one and says which. ``on_parked``: what to do when the weights are in host memory.
    """

    op = "generate"
    model: str
    params: dict[str, Any] = field(default_factory=dict)
    images: dict[str, list[int]] = field(default_factory=dict)
    seed: int | None = None
    count: int = 1
    format: ImageFormat = "png"
    on_parked: OnParked = "refuse"
    gpu: int | None = None
    timeout_s: float | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _within("count", self.count, 1, MAX_BLOBS)
        if self.seed is not None:
            _within("seed", self.seed, 0, MAX_SEED)


@_message
class Cancel(Request):
    """Cancel the request with the id ``target``: a job, a queued operation or a subscription."""

    op = "cancel"
    target: str


@_message
class Subscribe(Request):
    """Stream every event until cancelled or the client is gone."""

    op = "subscribe"


@_message
class LeaseAcquire(Request):
    """Take GPUs away from the daemon's models for another program.

    The answer comes when the memory is free. ``need_bytes``: free device memory the holder wants.
    ``mode`` and ``suspend`` as in unload. ``queue_jobs``: jobs for the leased GPUs wait instead
    of being refused. ``ttl_s``: the lease ends that long after the last renewal, whatever
    becomes of the client; without it, it ends with the client's process, which the daemon knows
    on the same host, and after 15 s without renewal elsewhere. ``wait_s``: how long to wait behind
    another lease; 0 refuses at once.
    """

    op = "lease_acquire"
    gpus: list[int] | None = None
    need_bytes: int = 0
    mode: Mode = "wait"
    suspend: bool = False
    queue_jobs: bool = True
    ttl_s: float | None = None
    wait_s: float = 0.0
    timeout_s: float | None = None
    command: str = ""


@_message
class LeaseRelease(Request):
    """End a lease; answers when what was loaded before is loaded again.

    ``reload``: bring the models back. ``wait_s``: how long to wait for memory that the other
    program still holds.
    """

    op = "lease_release"
    lease: str
    reload: bool = True
    force: bool = False
    wait_s: float = 30.0
    timeout_s: float | None = None


@_message
class LeaseRenew(Request):
    """Say that the holder of a lease with a time-to-live is alive."""

    op = "lease_renew"
    lease: str


@_message
class LeaseList(Request):
    """The leases in force and those that wait."""

    op = "lease_list"


@_message
class Phase(Request):
    """Move to the declared phase ``name`` with the fewest transfers."""

    op = "phase"
    name: str
    mode: Mode = "wait"
    timeout_s: float | None = None


@_message
class LoraAdd(Request):
    """Load the catalogued adapter ``adapter`` onto ``model`` at ``scale``."""

    op = "lora_add"
    model: str
    adapter: str
    scale: float = 1.0


@_message
class LoraRemove(Request):
    """Take an adapter off a model."""

    op = "lora_remove"
    model: str
    adapter: str


@_message
class LoraList(Request):
    """The adapters of a model, per worker."""

    op = "lora_list"
    model: str


AnyRequest = (
    Ping
    | Status
    | Models
    | Load
    | Unload
    | Reload
    | Generate
    | Cancel
    | Subscribe
    | LeaseAcquire
    | LeaseRelease
    | LeaseRenew
    | LeaseList
    | Phase
    | LoraAdd
    | LoraRemove
    | LoraList
)

REQUESTS: dict[str, type[Any]] = {cls.op: cls for cls in get_args(AnyRequest)}


@functools.cache
def _converter() -> MsgpackConverter:
    """Structures requests strictly. Only the daemon needs it, so a client does not import it."""
    from cattrs.preconf.msgpack import make_converter  # noqa: PLC0415

    converter = make_converter(forbid_extra_keys=True)
    for kind, also in ((bool, bool), (int, int), (str, str), (float, int)):
        converter.register_structure_hook(kind, _exactly(kind, also))
    return converter


def _exactly(kind: type[Any], also: type[Any]) -> Callable[[Any, Any], Any]:
    """Refuse to coerce: cattrs would turn the string "no" into True."""

    def structure(value: Any, _: Any) -> Any:
        if type(value) not in {kind, also}:
            raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
        return kind(value)

    return structure


def encode(message: Request | dict[str, Any], blobs: Sequence[Any] = ()) -> list[Any]:
    """Frames for a request, a reply or an event."""
    fields = to_map(message) if isinstance(message, Request) else message
    return [VERSION, msgpack.packb(fields), *blobs]


def to_map(request: Request) -> dict[str, Any]:
    """The request as it travels: its fields and ``op``."""
    return {"op": request.op, **vars(request)}


def decode_map(frame: bytes | memoryview) -> dict[str, Any]:
    """Unpack the map of a message within the limits.

    Raises:
        BadRequest: not a map with string keys, or larger or deeper than allowed.
    """
    if len(frame) > MAX_MAP_BYTES:
        raise BadRequest(f"the map has {len(frame)} bytes; the limit is {MAX_MAP_BYTES}")
    fields = _unpack(frame)
    if not isinstance(fields, dict):
        raise BadRequest("the second frame must be a msgpack map")
    return fields


def _unpack(frame: bytes | memoryview) -> Any:
    try:
        value = msgpack.unpackb(
            frame,
            strict_map_key=True,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
        _check_size(value)
    except (ValueError, TypeError, msgpack.UnpackException) as broken:
        raise BadRequest(f"not readable as msgpack: {broken or type(broken).__name__}") from None
    return value


def _check_size(value: Any) -> None:
    """Bound depth and total count: a megabyte of empty arrays unpacks to 77 MB."""
    level, items = [value], 0
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        items += len(level)
        if items > MAX_ITEMS:
            raise ValueError(f"more than {MAX_ITEMS} items")
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _children(node: Any) -> list[Any]:
    """What a list or a map holds; msgpack's strictness lets keys of bytes pass."""
    if isinstance(node, dict):
        if not all(isinstance(key, str) for key in node):
            raise TypeError("a key that is not a string")
        return list(node.values())
    return node if isinstance(node, list) else []


def request_from_map(fields: dict[str, Any]) -> Any:
    """The typed request (one of :data:`AnyRequest`) for a decoded map.

    Raises:
        BadRequest: unknown operation, unknown, missing or ill-typed field; names the field.
    """
    op = fields.get("op")
    cls = REQUESTS.get(op) if isinstance(op, str) else None
    if cls is None:
        raise BadRequest(f"unknown operation {op!r}", f"one of {', '.join(REQUESTS)}")
    from cattrs import BaseValidationError, transform_error  # noqa: PLC0415  see _converter

    try:
        return _converter().structure({k: v for k, v in fields.items() if k != "op"}, cls)
    except BaseValidationError as invalid:
        problems = transform_error(invalid, path="request", format_exception=_described)
        raise BadRequest(f"{op}: {'; '.join(problems)}") from None


def _described(problem: BaseException, expected: type[Any] | None) -> str:
    """In a request's own words where it has found the problem itself."""
    from cattrs.v import format_exception  # noqa: PLC0415  see _converter

    own = expected is None and isinstance(problem, ValueError)
    return str(problem) if own else format_exception(problem, expected)


def decode_reply(frames: Sequence[Any]) -> tuple[dict[str, Any], list[bytes]]:
    """Map and blobs of a reply or an event, without the limits that guard the daemon.

    Raises:
        BadRequest: another protocol version, or not a message of this protocol.
    """
    if len(frames) < 2 or bytes(frames[0]) != VERSION:
        raise BadRequest("the daemon speaks another protocol", f"this client speaks {VERSION!r}")
    fields = msgpack.unpackb(frames[1])
    if not isinstance(fields, dict):
        raise BadRequest("the daemon's answer is not a map")
    return fields, [bytes(frame) for frame in frames[2:]]
