"""The attacks, one function each: they return seconds until all was well again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable

import attrs

from gpuctl import GpuctlError
from tests.chaos import blows
from tests.chaos.arena import BACK_S, Arena, runs, unready
from tests.chaos.blows import Blow
from tests.chaos.crowd import DRAWING, EIGHT, MODEL, Choose, Crowd, Ledger

POLL_S = 0.02
PAUSE_S = (0.1, 0.6)
"""Between two blows; a worker is back after 0.4 s, so jobs and moves get done in between."""
GONE_S = 2.0


@attrs.define
class Trial:
    """One run of a scenario: what it acts on, and what it finds wrong.

    ``revived``: workers that were given up after three deaths in a row while they loaded, as they
    should be, and that a command brought back.
    """

    arena: Arena
    ledger: Ledger
    dice: random.Random
    wrongs: list[str] = attrs.field(factory=list)
    revived: int = 0

    def crowd(self, *parts: Choose) -> Crowd:
        """Clients whose every request must be answered once."""
        return Crowd(self.arena.daemon.endpoint, self.ledger, parts, self.dice.getrandbits(32))

    def forlorn_crowd(self, *parts: Choose) -> Crowd:
        """Clients whose daemon dies: they give up soon, and nobody counts their answers."""
        seed = self.dice.getrandbits(32)
        return Crowd(self.arena.daemon.endpoint, Ledger(), parts, seed, patience_s=1.0)


@attrs.define
class Struck:
    """A worker on its way down and up again."""

    pid: int
    blow: Blow
    at: float
    gone_at: float | None = None


def siege(trial: Trial, count: int, kinds: list[Blow], pause_s: tuple[float, float]) -> list[float]:
    """Strike workers that are ready, at random moments, under eight clients.

    Seconds from the end of each process until its successor is ready.
    """
    down: dict[int, Struck] = {}
    back: list[float] = []
    struck, due = 0, 0.0
    with trial.crowd(*EIGHT), trial.arena.daemon.client() as client:
        while struck < count or down:
            now, status = time.monotonic(), client.status()
            back += _risen(trial, down, status, now)
            ready = [each for each in status["workers"] if each["gpu"] not in unready(status)]
            standing = [each for each in ready if each["gpu"] not in down]
            if struck < count and standing and now >= due:
                victim = trial.dice.choice(standing)
                down[victim["gpu"]] = _strike(victim["pid"], trial.dice.choice(kinds))
                _set_faults(trial, down)
                struck, due = struck + 1, now + trial.dice.uniform(*pause_s)
            time.sleep(POLL_S)
    return back


def _strike(pid: int, blow: Blow) -> Struck:
    if blow.signal is not None:
        os.kill(pid, blow.signal)
    return Struck(pid, blow, time.monotonic())


def _risen(trial: Trial, down: dict[int, Struck], status: dict, now: float) -> list[float]:
    """Take those that are up again from ``down``; how long each was not there."""
    took = []
    for worker in status["workers"]:
        struck = down.get(worker["gpu"])
        if struck is None:
            continue
        if struck.gone_at is None and not runs(struck.pid):
            struck.gone_at = now
            _set_faults(trial, down)
        if worker["state"] == "failed":
            trial.revived += 1
            trial.arena.daemon.popen("load", MODEL, stdout=subprocess.DEVNULL)
            del down[worker["gpu"]]
            continue
        replaced = worker["state"] == "ready" and worker["pid"] != struck.pid
        if struck.gone_at is not None and replaced:
            took.append(now - struck.gone_at)
            del down[worker["gpu"]]
        elif now - struck.at > BACK_S:
            trial.wrongs.append(f"gpu {worker['gpu']} is not back: {worker['state']}")
            del down[worker["gpu"]]
    return took


def _set_faults(trial: Trial, down: dict[int, Struck]) -> None:
    """Only those that have not worked yet."""
    trial.arena.daemon.inject(
        *[
            {**each.blow.fault, "gpu": gpu}
            for gpu, each in down.items()
            if each.blow.fault and each.gone_at is None
        ]
    )


def worker_kills(trial: Trial, count: int) -> list[float]:
    """kill -9 of workers while they load, generate, unload, reload or rest."""
    return siege(trial, count, [blows.KILL], PAUSE_S)


def worker_stops(trial: Trial, count: int) -> list[float]:
    """SIGSTOP of workers; the daemon ends them when it has heard nothing for too long."""
    return siege(trial, count, [blows.STOP], PAUSE_S)


def sticky_faults(trial: Trial, count: int) -> list[float]:
    """CUDA errors that no process survives, faked."""
    return siege(trial, count, [blows.STICKY], PAUSE_S)


def mixed(trial: Trial, count: int) -> list[float]:
    """Now this, now that, with pauses of up to four seconds."""
    return siege(trial, count, list(blows.ALL.values()), (0.5, 4.0))


def controller_stops(trial: Trial, count: int) -> list[float]:
    """SIGSTOP of the daemon, SIGCONT a while later; seconds until it answers again."""
    took = []
    with trial.crowd(*EIGHT):
        for _ in range(count):
            time.sleep(trial.dice.uniform(0.2, 1.0))
            trial.arena.daemon.process.send_signal(signal.SIGSTOP)
            time.sleep(trial.dice.uniform(0.1, 2.0))
            trial.arena.daemon.process.send_signal(signal.SIGCONT)
            began = time.monotonic()
            trial.arena.daemon.client().ping()
            took.append(time.monotonic() - began)
    return took


def controller_kills(trial: Trial, count: int) -> list[float]:
    """kill -9 of the daemon under load; seconds from its next start until the models are back."""
    took = []
    for _ in range(count):
        workers = trial.arena.daemon.worker_pids()
        with trial.forlorn_crowd(*DRAWING):
            time.sleep(trial.dice.uniform(0.05, 0.8))
            trial.arena.daemon.stop(signal.SIGKILL)
        trial.wrongs += [f"worker {pid} outlived the daemon" for pid in _outliving(workers)]
        took.append(_start(trial))
    return took


def _outliving(pids: list[int]) -> list[int]:
    deadline = time.monotonic() + GONE_S
    while (left := [pid for pid in pids if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return left


def _start(trial: Trial) -> float:
    """Seconds until the models are back."""
    began = time.monotonic()
    trial.arena.start()
    try:
        trial.arena.daemon.wait_for(
            lambda _: set(trial.arena.daemon.states(MODEL)) == {"loaded"}, BACK_S
        )
    except (AssertionError, GpuctlError) as error:
        trial.wrongs.append(f"the models are not back: {error}")
    return time.monotonic() - began


def stops_under_load(trial: Trial, count: int) -> list[float]:
    """SIGTERM while eight clients work; seconds until the daemon has left."""
    took = []
    for _ in range(count):
        with trial.crowd(*DRAWING) as visitors:
            time.sleep(trial.dice.uniform(0.1, 0.8))
            visitors.leave()
            began = time.monotonic()
            trial.wrongs += trial.arena.end()
            took.append(time.monotonic() - began)
        _start(trial)
    return took


SCENARIOS: dict[str, Callable[[Trial, int], list[float]]] = {
    "worker-kills": worker_kills,
    "worker-stops": worker_stops,
    "sticky-faults": sticky_faults,
    "mixed": mixed,
    "controller-stops": controller_stops,
    "controller-kills": controller_kills,
    "stops-under-load": stops_under_load,
}
