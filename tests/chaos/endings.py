"""The daemon itself is stopped, killed, asked to leave, or not alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

from gpuctl import GpuctlError
from gpuctl.errors import Busy
from tests.chaos.arena import BACK_S, runs
from tests.chaos.crowd import DRAWING, EIGHT, MODEL
from tests.chaos.trial import Trial
from tests.integration.daemon import Daemon

POLL_S = 0.02
GONE_S = 2.0
DAEMONS = 4
LEAVES_S = 10.0
LEAVES_CPU_S = 1.0
"""Of the processor, Python's own start included: a busy machine does not count against it."""


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


def daemons_at_once(trial: Trial, count: int) -> list[float]:
    """Four daemons started at once for one socket; seconds until three have left."""
    home = trial.arena.daemon.home.with_name("rivals")
    home.mkdir()
    contested = Daemon(home, workers=1)
    return [_contest(trial, contested) for _ in range(count)]


def _contest(trial: Trial, contested: Daemon) -> float:
    began = time.monotonic()
    rivals = {each.pid: each for each in [_rival(contested) for _ in range(DAEMONS)]}
    said = []
    while len(rivals) > 1 and time.monotonic() - began < LEAVES_S:
        pid, status, spent_s = _ended(rivals)
        if not pid:
            time.sleep(POLL_S)
            continue
        said.append(_last_words(rivals.pop(pid), status))
        if status != Busy.exit_status or spent_s > LEAVES_CPU_S:
            trial.wrongs.append(f"a daemon left with {status} after {spent_s:.1f} s: {said[-1]}")
    took = time.monotonic() - began
    if len(rivals) != 1:
        trial.wrongs.append(f"{len(rivals)} daemons stayed")
    for pid, winner in rivals.items():
        winner.kill()
        winner.communicate()
        trial.wrongs += [f"not named: {words}" for words in said if not _names(words, pid)]
    return took


def _rival(contested: Daemon) -> subprocess.Popen[str]:
    return subprocess.Popen(
        contested.command, env=contested.environ, stderr=subprocess.PIPE, text=True
    )


def _ended(rivals: dict[int, subprocess.Popen[str]]) -> tuple[int, int, float]:
    """Pid, exit status and processor time of one that has ended; zeros if none has."""
    for pid in rivals:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return pid, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    return 0, 0, 0.0


def _last_words(loser: subprocess.Popen[str], status: int) -> str:
    loser.returncode = status  # it has been waited for
    return loser.communicate()[1]


def _names(words: str, pid: int) -> bool:
    return re.search(rf"pid {pid}\b", words) is not None
