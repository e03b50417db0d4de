"""Clients that never stop asking, and the ledger of what they were told."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Self

import attrs
import zmq

from gpuctl import protocol
from gpuctl.protocol import Request

MODEL = "shapes"
PROMPT = "a small green star on a white background"
STEPS = 2
ANSWER_S = 90.0
"""A job whose worker is stopped is answered when that is noticed, after others before it."""
LATE_S = 0.5
"""How long second answers are waited for."""
GLANCE_S = 0.02

Choose = Callable[[random.Random], Request]


@attrs.define
class Ledger:
    """Every request and its terminal answers. Clients write to it from their threads."""

    asked: dict[str, str] = attrs.field(factory=dict)
    answers: Counter[str] = attrs.field(factory=Counter)
    codes: Counter[str] = attrs.field(factory=Counter)
    glances_s: list[float] = attrs.field(factory=list)

    def note(self, fields: dict, took_s: float) -> None:
        """A terminal answer."""
        self.answers[fields["id"]] += 1
        self.codes["ok" if fields["ok"] else fields["error"]["code"]] += 1
        if fields["op"] == "status":
            self.glances_s.append(took_s)

    def complaints(self) -> list[str]:
        """Requests that were not answered exactly once."""
        return [
            f"{op} {id_} has {self.answers[id_]} answers"
            for id_, op in self.asked.items()
            if self.answers[id_] != 1
        ]


class Visitor(threading.Thread):
    """Asks, waits for the answer, asks again, on a socket of its own."""

    def __init__(
        self,
        endpoint: str,
        ledger: Ledger,
        choose: Choose,
        dice: random.Random,
        patience_s: float,
    ) -> None:
        super().__init__(daemon=True)
        self._endpoint = endpoint
        self._ledger = ledger
        self._choose = choose
        self._dice = dice
        self._patience_s = patience_s
        self._leaving = threading.Event()

    def leave(self) -> None:
        """Ask nothing more; the thread ends when the last answer is there, or overdue."""
        self._leaving.set()

    def run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(self._endpoint)
            while not self._leaving.is_set():
                self._ask(socket, self._choose(self._dice))
            self._read(socket, time.monotonic(), lambda: False, LATE_S)

    def _ask(self, socket: zmq.Socket, request: Request) -> None:
        self._ledger.asked[request.id] = request.op
        began = time.monotonic()
        socket.send_multipart(protocol.encode(request))
        self._read(socket, began, lambda: self._ledger.answers[request.id] > 0, self._patience_s)
        if request.op == "status":
            self._leaving.wait(GLANCE_S)

    def _read(
        self, socket: zmq.Socket, began: float, enough: Callable[[], bool], seconds: float
    ) -> None:
        """Note answers until there are enough, or for as long."""
        deadline = time.monotonic() + seconds
        while not enough() and (left := deadline - time.monotonic()) > 0:
            if socket.poll(left * 1000):
                fields, _ = protocol.decode_reply(socket.recv_multipart())
                if "event" not in fields:
                    self._ledger.note(fields, time.monotonic() - began)


def draw(dice: random.Random) -> Request:
    """A picture; the seed is the mark by which a second run of it would be seen."""
    params = {"prompt": PROMPT, "num_inference_steps": STEPS}
    return protocol.Generate(
        model=MODEL, params=params, seed=dice.randrange(2**62), on_parked="reload", timeout_s=60
    )


def glance(_: random.Random) -> Request:
    """The status."""
    return protocol.Status()


def move(dice: random.Random) -> Request:
    """Away and back, more often back."""
    gpus = dice.choice([None, [0], [1]])
    moves = [
        protocol.Unload(model=MODEL, gpus=gpus),
        protocol.Reload(model=MODEL),
        protocol.Reload(model=MODEL, gpus=gpus, wait_s=5),
        protocol.Load(model=MODEL),
        protocol.Load(model=MODEL),
    ]
    return dice.choice(moves)


EIGHT: tuple[Choose, ...] = (draw, draw, draw, draw, draw, glance, glance, move)
DRAWING: tuple[Choose, ...] = (draw,) * 6 + (glance, glance)


class Crowd:
    """Visitors, one for each part, while a ``with`` block runs; they leave with their last answers.

    ``patience_s``: how long an answer is waited for.
    """

    def __init__(
        self,
        endpoint: str,
        ledger: Ledger,
        parts: tuple[Choose, ...],
        seed: int,
        patience_s: float = ANSWER_S,
    ) -> None:
        self._patience_s = patience_s
        self._visitors = [
            Visitor(endpoint, ledger, part, random.Random(f"{seed}-{number}"), patience_s)
            for number, part in enumerate(parts)
        ]

    def __enter__(self) -> Self:
        for each in self._visitors:
            each.start()
        return self

    def leave(self) -> None:
        """Have them ask nothing more."""
        for each in self._visitors:
            each.leave()

    def __exit__(self, *_: object) -> None:
        self.leave()
        for each in self._visitors:
            each.join(self._patience_s + LATE_S)
