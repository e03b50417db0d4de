"""Real CUDA errors that no process survives, under eight clients."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

from tests.chaos import report, trial
from tests.chaos.scenarios import SCENARIOS

pytestmark = pytest.mark.gpu

REPORT = os.environ.get("GPUCTL_TEST_REPORT")
"""A folder for the run's JSON file, of which docs/reliability.md is made."""


@pytest.mark.timeout(240)
def test_workers_come_back_with_their_models(fork_servers, tmp_path):
    attack = SCENARIOS["cuda-faults"]
    seed = random.SystemRandom().randrange(2**32)
    found = trial.run("cuda-faults", attack, attack.at_length, seed, tmp_path, fork_servers)
    sys.stdout.write(report.summary(found))
    if REPORT is not None:
        report.save(found, Path(REPORT))
    assert found["wrongs"] == []
