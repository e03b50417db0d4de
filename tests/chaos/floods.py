"""What strangers can do to the daemon's socket, while a good client wants the status."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import socket
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import msgpack
import zmq

from gpuctl import GpuctlError, protocol
from gpuctl.errors import BadRequest
from tests.chaos.arena import Arena
from tests.chaos.crowd import MODEL
from tests.chaos.trial import Trial
from tests.integration.daemon import Daemon

ANSWER_MS = 20_000
QUIET_MS = 1_000
LINGERING = 40
"""Connections that an attacker of raw bytes holds open at a time."""
FLOOD = 20_000
DESCRIPTORS = 256
HARMLESS = (protocol.Ping, protocol.Status, protocol.Models, protocol.LeaseList)
OTHER = {protocol.Models: protocol.LeaseList, protocol.LeaseList: protocol.Models}
REPEATS = 5
BATCH = 1_000
"""Requests that are repeated together: fewer than the answers on record."""

# ZMTP 3.1: signature, version, mechanism, filler; then a READY command.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
_SOCKET_TYPE = b"\x05READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
READY = b"\x04" + bytes([len(_SOCKET_TYPE)]) + _SOCKET_TYPE

STRANGERS = [None, True, -1, 2**64 - 1, 1e308, float("nan"), "", "x" * 99, b"\xff", [], {}]
STRANGERS += [[[]], {"a": {"b": [None]}}, [0, "0"], {"image": [0]}]

NarrowArena = partial(Arena, under=("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"))
"""A daemon with few descriptors."""


@contextlib.contextmanager
def connected(daemon: Daemon, routing_id: bytes | None = None) -> Iterator[zmq.Socket]:
    """A client without manners: the bare socket."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.linger = 0
        client.rcvhwm = 10
        client.sndtimeo = client.rcvtimeo = ANSWER_MS
        if routing_id is not None:
            client.routing_id = routing_id
        client.connect(daemon.endpoint)
        yield client


def _path(daemon: Daemon) -> str:
    return daemon.endpoint.removeprefix("ipc://")


# --- messages -------------------------------------------------------------------------------


def malformed(trial: Trial, count: int) -> list[float]:
    """Damaged msgpack: four of five into the decoder, for any request; one in five at the socket.

    Those at the socket are of requests that change nothing, as damage may leave one whole.
    """
    for _ in range(count * 4 // 5):
        _decode(trial, damaged(trial.dice))
    with trial.onlooker(), connected(trial.arena.daemon) as client:
        for _ in range(count // 5):
            client.send_multipart([protocol.VERSION, damaged_map(trial.dice)])
            while client.poll(0):
                _check_answer(trial, client)
        _ask_last(trial, client)
    return []


def _decode(trial: Trial, body: bytes) -> None:
    try:
        protocol.request_from_map(protocol.decode_map(body))
    except BadRequest:
        return
    except Exception as wrong:  # noqa: BLE001  this is what is looked for
        trial.wrongs.append(f"{body.hex()} raises {wrong!r}")


def damaged(chance: random.Random) -> bytes:
    """A valid request with fields swapped for strangers, then bytes changed, cut or doubled."""
    cls = chance.choice(list(protocol.REQUESTS.values()))
    names = [field.name for field in dataclasses.fields(cls)]
    fields = {name: chance.choice(STRANGERS) for name in names if chance.random() < 0.5}
    return _damage(msgpack.packb({"op": cls.op, "id": "x", "model": "m", **fields}), chance)


def damaged_map(chance: random.Random) -> bytes:
    """A harmless request with bytes changed, cut, doubled or replaced by noise."""
    return _damage(protocol.encode(chance.choice(HARMLESS)())[1], chance)


def _damage(whole: bytes, chance: random.Random) -> bytes:
    body = bytearray(whole)
    for _ in range(chance.randrange(4)):
        body[chance.randrange(len(body))] = chance.randrange(256)
    cut = chance.randrange(len(body))
    return chance.choice([bytes(body), bytes(body[:cut]), body[cut:] + body, chance.randbytes(cut)])


def _check_answer(trial: Trial, client: zmq.Socket) -> str:
    """The id of the answer that has come."""
    fields, _ = protocol.decode_reply(client.recv_multipart())
    if "event" not in fields and not fields["ok"] and not fields["error"]["code"]:
        trial.wrongs.append(f"an answer without a word: {fields}")
    return fields["id"]


def _ask_last(trial: Trial, client: zmq.Socket) -> None:
    """The sender of nonsense is heard as well."""
    client.send_multipart(protocol.encode(last := protocol.Ping()))
    while client.poll(ANSWER_MS):
        if _check_answer(trial, client) == last.id:
            return
    trial.wrongs.append("a ping behind the attack was not answered")


# --- bombs ----------------------------------------------------------------------------------


def bombs(trial: Trial, count: int) -> list[float]:
    """Messages of too many parts or items, too deep or too large; each is refused and counted."""
    every = list(_bombs())
    sent = [every[number % len(every)] for number in range(count)]
    daemon = trial.arena.daemon
    before = _refused(daemon)
    with trial.onlooker(), connected(daemon) as client:
        for bomb in sent:
            client.send_multipart(bomb)
        _ask_last(trial, client)
    if (refused := _refused(daemon) - before) != count:
        trial.wrongs.append(f"{refused} of {count} bombs were refused")
    return []


def _bombs() -> Iterator[list[bytes]]:
    """Messages of frames that are each within the limit of a frame."""
    nested = b"\x81\xa1a" + b"\x91" * 60_000 + b"\xc0"
    empty = b"\x81\xa1a\xdd" + (1_000_000).to_bytes(4, "big") + b"\x90" * 1_000_000
    claims = b"\x81\xa1a\xdd\xff\xff\xff\xff"
    wide = msgpack.packb({str(i): [] for i in range(10_001)})
    parts = [b""] * 5_000
    ping = msgpack.packb({"op": "ping", "id": "a"})
    yield from ([protocol.VERSION, body] for body in (nested, empty, claims, wide))
    yield from ([protocol.VERSION, ping, *parts], parts, [protocol.VERSION], [b""])
    yield [protocol.VERSION, ping, *[b"x" * 100_000] * (protocol.MAX_BLOBS + 1)]
    yield [b"gpuctl/2", ping]


def _refused(daemon: Daemon) -> int:
    return daemon.client().status()["daemon"]["refused_messages"]


# --- connections ----------------------------------------------------------------------------


def raw_bytes(trial: Trial, count: int) -> list[float]:
    """Connections that send noise, or a handshake of ZeroMQ cut, damaged or followed by noise."""
    lingering: deque[socket.socket] = deque(maxlen=LINGERING)
    with trial.onlooker():
        for _ in range(count):
            each = socket.socket(socket.AF_UNIX)
            each.connect(_path(trial.arena.daemon))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                each.sendall(_raw_bytes(trial.dice))
            if len(lingering) == LINGERING:
                lingering.popleft().close()
            lingering.append(each)
        for each in lingering:
            each.close()
    return []


def _raw_bytes(chance: random.Random) -> bytes:
    """Noise; a greeting cut or damaged; a handshake cut; a whole one with noise behind it."""
    handshake = GREETING + READY
    noise = chance.randbytes(chance.randrange(300))
    cut = handshake[: chance.randrange(len(handshake))]
    damaged = bytearray(handshake)
    damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    huge = handshake + b"\x02" + (protocol.MAX_BLOB_BYTES + 1).to_bytes(8, "big")
    endless = handshake + b"\x02" + b"\xff" * 8
    return chance.choice([noise, cut, bytes(damaged) + noise, handshake + noise, huge, endless])


def silent_connections(trial: Trial, count: int) -> list[float]:
    """Connections that say nothing, more than a daemon with 256 descriptors can have.

    In floods of 20,000, at least two; seconds from the end of each until a newcomer is served.
    """
    floods = max(2, count // FLOOD)
    took = []
    with trial.onlooker():
        for _ in range(floods):
            with silence(_path(trial.arena.daemon), count // floods) as through:
                if not DESCRIPTORS // 4 < through < count // floods:
                    trial.wrongs.append(f"{through} of {count // floods} connections came through")
            took.append(_until_served(trial))
    return took


@contextlib.contextmanager
def silence(path: str, number: int) -> Iterator[int]:
    """Connections that say nothing, 1,000 a second; how many the kernel let through.

    With so few descriptors a storm would outrun the daemon's count on a busy machine: for what
    holds with more of them see ``tests/unit/test_entrances.py``.
    """
    with contextlib.ExitStack() as opened:
        through = 0
        for _ in range(number):
            each = socket.socket(socket.AF_UNIX)
            each.setblocking(False)
            time.sleep(0.001)
            try:
                each.connect(path)
            except (BlockingIOError, ConnectionRefusedError):
                each.close()
            else:
                opened.enter_context(each)
                through += 1
        yield through


def _until_served(trial: Trial) -> float:
    """Seconds until somebody new can come in."""
    began = time.monotonic()
    while True:
        try:
            trial.arena.daemon.client().ping()
            return time.monotonic() - began
        except GpuctlError as refused:
            if time.monotonic() - began > ANSWER_MS / 1000:
                trial.wrongs.append(f"a newcomer is not served: {refused}")
                return time.monotonic() - began


# --- deaf clients ---------------------------------------------------------------------------


def unread_answers(trial: Trial, count: int) -> list[float]:
    """A client asks for the status and never reads an answer."""
    with trial.onlooker(), connected(trial.arena.daemon) as deaf:
        for _ in range(count):
            deaf.send_multipart(protocol.encode(protocol.Status()))
    return []


def deaf_subscribers(trial: Trial, count: int) -> list[float]:
    """A subscriber reads nothing while models move, and then finds a gap in the numbers."""
    with connected(trial.arena.daemon) as deaf, trial.arena.daemon.client() as client:
        deaf.send_multipart(protocol.encode(protocol.Subscribe()))
        with trial.onlooker():
            for _ in range(count):
                client.unload(MODEL)
                client.reload(MODEL)
        numbers = list(_event_numbers(deaf))
    gaps = [after for before, after in pairwise(numbers) if after > before + 1]
    if not gaps:
        trial.wrongs.append(f"{len(numbers)} events came and none was missed")
    return []


def _event_numbers(subscriber: zmq.Socket) -> Iterator[int]:
    """Of what waits for a subscriber, and of what comes while it reads."""
    while subscriber.poll(QUIET_MS):
        fields, _ = protocol.decode_reply(subscriber.recv_multipart())
        yield fields["seq"]


# --- repeats --------------------------------------------------------------------------------


def repeats(trial: Trial, count: int) -> list[float]:
    """Each request five times in any order, over five connections: one answer, word for word.

    And each id once more for another request, which is refused.
    """
    with trial.onlooker():
        for _ in range(max(1, count // (REPEATS * BATCH))):
            _repeat(trial, min(BATCH, count // REPEATS))
    return []


def _repeat(trial: Trial, number: int) -> None:
    requests = [trial.dice.choice([*OTHER])() for _ in range(number)]
    script = [protocol.encode(each) for each in requests] * REPEATS
    trial.dice.shuffle(script)
    answers: dict[str, set[bytes]] = {}
    for part in range(REPEATS):
        with connected(trial.arena.daemon) as client:
            for request in script[part::REPEATS]:
                body = _answer(client, request)
                answers.setdefault(msgpack.unpackb(body)["id"], set()).add(body)
    if set(answers) != {each.id for each in requests}:
        trial.wrongs.append(f"{len(answers)} of {number} requests were answered")
    differing = [id_ for id_, bodies in answers.items() if len(bodies) != 1]
    trial.wrongs += [f"{id_} was answered in several ways" for id_ in differing]
    with connected(trial.arena.daemon) as client:
        for each in requests:
            other = _answer(client, protocol.encode(OTHER[type(each)](id=each.id)))
            if msgpack.unpackb(other)["ok"]:
                trial.wrongs.append(f"{each.id} was used for two requests")


def _answer(client: zmq.Socket, request: list[bytes]) -> bytes:
    """The map of the answer, as it came."""
    client.send_multipart(request)
    return client.recv_multipart()[1]
