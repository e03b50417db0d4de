"""One scenario from its daemon's start to its end, and everything that was seen."""

from __future__ import annotations

import datetime as dt
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from tests.chaos.arena import Arena
from tests.chaos.crowd import Choose, Crowd, Ledger
from tests.chaos.onlooker import Onlooker
from tests.integration.fork_servers import ForkServers

EXTRA_DESCRIPTORS = 8
"""What a worker that has just come back may hold for a moment more."""
SETTLED_S = 5.0
"""For connections to be closed: more than the daemon waits for a handshake."""
FLAT_MIB = 64
"""What allocators keep after a burst; the attacks move far more than that."""
LEAK_MIB_PER_H = 1.0


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

    def onlooker(self) -> Onlooker:
        """A good client that asks for the status all the time, in a process of its own."""
        return Onlooker(self.arena.daemon, self.ledger.glances_s, self.wrongs)


@attrs.frozen(kw_only=True)
class Scenario:
    """An attack, how often it is made, and what its figures must not exceed.

    ``attack`` returns seconds; ``took`` says of what, and ``took_s`` bounds their 99th percentile,
    ``status_s`` that of the status for a client that does nothing wrong; ``None``: no bound.
    """

    attack: Callable[[Trial, int], list[float]]
    in_ci: int
    at_length: int
    took: str
    took_s: float | None
    status_s: float | None = 0.05
    stage: Callable[..., Arena] = Arena
    needs_gpu: bool = False


def run(  # noqa: PLR0913  two of them are for a busy machine
    name: str,
    scenario: Scenario,
    count: int,
    seed: int,
    home: Path,
    fork_servers: ForkServers,
    *,
    silence_s: float | None = None,
    patience: float = 1.0,
) -> dict[str, Any]:
    """Run a scenario; ``wrongs`` of the answer is empty if all was well.

    ``patience``: how many times ``status_s`` the status may take, on a machine with other work.
    """
    began = time.monotonic()
    arena = scenario.stage(home / name, fork_servers, silence_s)
    trial = Trial(arena, Ledger(), random.Random(seed))
    descriptors = arena.descriptors
    took = scenario.attack(trial, count)
    trial.wrongs += trial.ledger.complaints() + arena.wrongs()
    if not arena.closes_down_to(descriptors + EXTRA_DESCRIPTORS, SETTLED_S):
        trial.wrongs.append(f"{arena.descriptors - descriptors} descriptors more than before")
    trial.wrongs += arena.end()
    trial.wrongs += _excesses(scenario, trial, took, patience)
    return {
        "scenario": name,
        "what": " ".join((scenario.attack.__doc__ or "").split()),
        "command": f"python -m tests.chaos attack {name} --count {count} --seed {seed}",
        "count": count,
        "seed": seed,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "host": f"{os.cpu_count()} cores, {arena.device}, Python {platform.python_version()}",
        "seconds": time.monotonic() - began,
        "wrongs": trial.wrongs,
        "revived": trial.revived,
        "took": scenario.took,
        "took_s": took,
        "bound_s": scenario.took_s,
        "requests": len(trial.ledger.asked),
        "codes": dict(trial.ledger.codes),
        "status_s": trial.ledger.glances_s,
        "growth_mib_per_h": arena.growth_mib_per_h(),
        "memory_mib": [arena.memory_mib[0][1], arena.memory_mib[-1][1]],
    }


def _excesses(scenario: Scenario, trial: Trial, took: list[float], patience: float) -> list[str]:
    """Which figures are above their bounds."""
    found = [
        _excess(scenario.took, took, scenario.took_s, 1.0),
        _excess("the status", trial.ledger.glances_s, scenario.status_s, patience),
        _growth(trial.arena),
    ]
    return [each for each in found if each]


def _excess(what: str, seconds: list[float], bound: float | None, patience: float) -> str:
    if bound is None or not seconds or (p99 := quantile(seconds, 0.99)) <= bound * patience:
        return ""
    return f"{what} took {p99:.3f} s (p99), more than {bound * patience:g} s"


def _growth(arena: Arena) -> str:
    grown = arena.memory_mib[-1][1] - arena.memory_mib[0][1]
    if grown > FLAT_MIB:
        return f"the daemon has {grown:.0f} MiB more than before"
    slope = arena.growth_mib_per_h()
    if slope is not None and slope > LEAK_MIB_PER_H:
        return f"the daemon's memory grows by {slope:.1f} MiB/h"
    return ""


def quantile(values: list[float], share: float) -> float:
    """The value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
