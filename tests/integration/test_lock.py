"""Several daemons for one socket: one serves, the others leave at once."""

from __future__ import annotations

import os
import re
import subprocess
import time

import pytest

from gpuctl.errors import Busy
from tests.integration.daemon import Daemon

ROUNDS = 20
LEAVES_CPU_S = 1.0
"""Of the processor, Python's own start included: a busy machine does not count against it."""
LEAVES_S = 10.0


def started(daemon: Daemon) -> subprocess.Popen[str]:
    return subprocess.Popen(daemon._command, env=daemon.environ, stderr=subprocess.PIPE, text=True)


def first_to_leave(daemons: dict[int, subprocess.Popen[str]]) -> tuple[int, int, float]:
    """Pid, exit status and processor time of the next one that ends."""
    deadline = time.monotonic() + LEAVES_S
    while time.monotonic() < deadline:
        for pid in daemons:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                return pid, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        time.sleep(0.01)
    raise AssertionError(f"{len(daemons)} daemons stayed")


@pytest.mark.slow
def test_of_four_daemons_started_at_once_one_serves(tmp_path):
    daemon = Daemon(tmp_path, workers=1)
    slowest = 0.0
    for _ in range(ROUNDS):
        start = time.monotonic()
        four = {each.pid: each for each in [started(daemon) for _ in range(4)]}
        said = []
        while len(four) > 1:
            pid, status, spent = first_to_leave(four)
            loser = four.pop(pid)
            loser.returncode = status
            said.append(loser.communicate()[1])
            assert status == Busy.exit_status
            assert spent < LEAVES_CPU_S
        slowest = max(slowest, time.monotonic() - start)
        [(winner, process)] = four.items()
        process.kill()
        process.communicate()
        assert all(re.search(rf"pid {winner}\b", words) for words in said), said
    print(f"the third loser had left after {slowest:.2f} s at most")  # noqa: T201


def test_the_winner_serves_and_a_latecomer_changes_nothing(shared_daemon):
    late = started(shared_daemon)
    assert f"pid {shared_daemon.process.pid}" in late.communicate(timeout=20)[1]
    assert late.returncode == Busy.exit_status
    with shared_daemon.client(timeout=5) as client:
        assert client.ping()["pid"] == shared_daemon.process.pid
