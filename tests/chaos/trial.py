"""One scenario from its daemon's start to its end, and everything that was seen."""

from __future__ import annotations

import datetime as dt
import os
import platform
import random
import time
from pathlib import Path
from typing import Any

from tests.chaos.arena import Arena
from tests.chaos.crowd import Ledger
from tests.chaos.scenarios import SCENARIOS, Trial
from tests.integration.fork_servers import ForkServers

EXTRA_DESCRIPTORS = 8
"""What a worker that has just come back may hold for a moment more."""


def run(
    scenario: str,
    count: int,
    seed: int,
    home: Path,
    fork_servers: ForkServers,
    silence_s: float | None = None,
) -> dict[str, Any]:
    """Run a scenario; ``wrongs`` of the answer is empty if all was well."""
    began = time.monotonic()
    arena = Arena(home / scenario, fork_servers, silence_s)
    trial = Trial(arena, Ledger(), random.Random(seed))
    descriptors = arena.descriptors
    took = SCENARIOS[scenario](trial, count)
    trial.wrongs += trial.ledger.complaints() + arena.wrongs()
    grown = arena.descriptors - descriptors
    if grown > EXTRA_DESCRIPTORS:
        trial.wrongs.append(f"{grown} descriptors more than before")
    trial.wrongs += arena.end()
    return {
        "scenario": scenario,
        "count": count,
        "seed": seed,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "host": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "seconds": time.monotonic() - began,
        "wrongs": trial.wrongs,
        "revived": trial.revived,
        "took_s": took,
        "requests": len(trial.ledger.asked),
        "codes": dict(trial.ledger.codes),
        "status_s": trial.ledger.glances_s,
        "growth_mib_per_h": arena.growth_mib_per_h(),
        "memory_mib": [arena.memory_mib[0][1], arena.memory_mib[-1][1]],
    }
