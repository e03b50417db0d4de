"""Workers are struck while eight clients work: how soon each is back."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import attrs
import pynvml

from tests.chaos import blows
from tests.chaos.arena import BACK_S, MIB, Arena, runs, unready
from tests.chaos.blows import Blow
from tests.chaos.crowd import EIGHT, MODEL
from tests.chaos.trial import Trial
from tests.integration.fork_servers import ForkServers

POLL_S = 0.02
PAUSE_S = (0.1, 0.6)
"""Between two blows; a worker is back after 0.4 s, so jobs and moves get done in between."""
FAULT_EVERY_S = (25.0, 35.0)
LEFT_MIB = 64
"""On a GPU after the end, more or less than before the start."""
LEFT_S = 10.0
"""For the driver to have it all back."""


@attrs.define
class Struck:
    """A worker on its way down and up again."""

    pid: int
    blow: Blow
    at: float
    gone_at: float | None = None


def _siege(
    trial: Trial, count: int, kinds: list[Blow], pause_s: tuple[float, float]
) -> list[float]:
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
            trial.arena.daemon.popen(
                "load", MODEL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
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
    return _siege(trial, count, [blows.KILL], PAUSE_S)


def worker_stops(trial: Trial, count: int) -> list[float]:
    """SIGSTOP of workers; the daemon ends them when it has heard nothing for too long."""
    return _siege(trial, count, [blows.STOP], PAUSE_S)


def sticky_faults(trial: Trial, count: int) -> list[float]:
    """CUDA errors that no process survives, faked."""
    return _siege(trial, count, [blows.STICKY], PAUSE_S)


class GpuArena(Arena):
    """Both workers on the first GPU, whose memory must be free again after the end."""

    def __init__(
        self, home: Path, fork_servers: ForkServers, silence_s: float | None = None
    ) -> None:
        pynvml.nvmlInit()
        self._gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        self._used_before = self._used_mib()
        super().__init__(home, fork_servers, silence_s, device="cuda:0")

    def _used_mib(self) -> float:
        return float(pynvml.nvmlDeviceGetMemoryInfo(self._gpu).used / MIB)

    def _left_mib(self) -> float:
        return self._used_mib() - self._used_before

    def end(self) -> list[str]:
        found = super().end()
        deadline = time.monotonic() + LEFT_S
        while abs(self._left_mib()) > LEFT_MIB and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self._left_mib()
        return found + ([f"{left:.0f} MiB are left on the GPU"] if abs(left) > LEFT_MIB else [])


def cuda_faults(trial: Trial, count: int) -> list[float]:
    """CUDA errors that no process survives, real ones: a kernel's assertion fails on the GPU."""
    return _siege(trial, count, [blows.CUDA], PAUSE_S)


def soak(trial: Trial, count: int) -> list[float]:
    """For a long time; every half minute a worker is killed, stopped or has a CUDA error."""
    return _siege(trial, count, [blows.KILL, blows.STOP, blows.STICKY], FAULT_EVERY_S)
