"""The attacks in short; ``make chaos`` has the long ones."""

from __future__ import annotations

import os
import random
import sys

import pytest

from tests.chaos import report, trial

SILENCE_S = 2.5
"""Instead of 10 s, so that ten stopped workers do not take minutes."""

ATTACKS = {
    "worker-kills": 100,
    "worker-stops": 10,
    "sticky-faults": 20,
    "mixed": 3,
    "controller-stops": 5,
    "controller-kills": 4,
    "stops-under-load": 10,
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("scenario", ATTACKS)
def test_all_is_well_after(scenario, fork_servers, tmp_path):
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(2**32)))
    sys.stdout.write(f"SEED={seed}\n")
    found = trial.run(scenario, ATTACKS[scenario], seed, tmp_path, fork_servers, SILENCE_S)
    sys.stdout.write(report.summary(found))
    assert found["wrongs"] == []
