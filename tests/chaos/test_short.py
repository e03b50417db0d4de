"""The attacks in short; ``make chaos`` has the long ones."""

from __future__ import annotations

import os
import random
import sys

import pytest

from tests.chaos import report, trial
from tests.chaos.scenarios import SCENARIOS

SILENCE_S = 2.5
"""Instead of 10 s, so that ten stopped workers do not take minutes."""
PATIENCE = 5.0
"""Other tests run beside these."""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [name for name, each in SCENARIOS.items() if each.in_ci])
def test_all_is_well_after(name, fork_servers, tmp_path):
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(2**32)))
    sys.stdout.write(f"SEED={seed}\n")
    found = trial.run(
        name,
        SCENARIOS[name],
        SCENARIOS[name].in_ci,
        seed,
        tmp_path,
        fork_servers,
        silence_s=SILENCE_S,
        patience=PATIENCE,
    )
    sys.stdout.write(report.summary(found))
    assert found["wrongs"] == []
