"""The real daemon with the workers of :mod:`tests.fakes.faulty_worker`.

``python -m tests.fakes.faulty_daemon ...`` takes the arguments of ``gpuctld``.
$GPUCTL_TEST_SILENCE_S says after how long without a sign of life a worker counts as stopped,
$GPUCTL_TEST_MAX_FAULTS after how many GPU faults in ten minutes a device is quarantined,
$GPUCTL_TEST_KEPT_ANSWERS how many answers are on record.
"""

from __future__ import annotations

import functools
import os
import sys

from gpuctld import __main__ as program
from gpuctld import answers
from gpuctld.fleet import workers

if __name__ == "__main__":
    workers.SILENCE_S = float(os.environ.get("GPUCTL_TEST_SILENCE_S", workers.SILENCE_S))
    workers.MAX_FAULTS = int(os.environ.get("GPUCTL_TEST_MAX_FAULTS", workers.MAX_FAULTS))
    kept = os.environ.get("GPUCTL_TEST_KEPT_ANSWERS", answers.KEPT_ANSWERS)
    answers.KEPT_ANSWERS = int(kept)
    service_build = program.build
    program.build = functools.partial(service_build, worker="tests.fakes.faulty_worker:faulty_main")
    sys.exit(program.main())
