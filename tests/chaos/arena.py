"""A daemon under attack, and what is measured of it."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.chaos.crowd import MODEL
from tests.integration.daemon import FAULTY, Daemon
from tests.integration.fork_servers import ForkServers

WORKERS = 2
MIB = 2**20
FAULTS = 1_000_000
"""Before a device is quarantined: here it is the worker's way back that is looked at."""
BACK_S = 60.0
"""Longer than any pause before a restart and any deadline of a step."""
SAMPLE_S = 1.0
SLOPE_POINTS = 1_200
"""Twenty minutes: a slope per hour of less is noise."""
KEPT_ANSWERS = 2_000
"""On record, instead of 10,000, so that pictures kept by design do not hide a leak."""
WARM_UP_S = 180
"""Then the record is full."""


class Arena:
    """Starts the daemon, and watches its process from the start to the end.

    ``silence_s``: after how long without a sign of life a worker counts as stopped, if not 10 s.
    ``under`` is a command that starts the daemon, ``more`` is added to its configuration.
    """

    def __init__(
        self,
        home: Path,
        fork_servers: ForkServers,
        silence_s: float | None = None,
        *,
        device: str = "cpu",
        under: tuple[str, ...] = (),
        more: str = "",
    ) -> None:
        home.mkdir(parents=True)
        self.device = device
        environ = [f"GPUCTL_TEST_MAX_FAULTS={FAULTS}", f"GPUCTL_TEST_KEPT_ANSWERS={KEPT_ANSWERS}"]
        environ += [] if silence_s is None else [f"GPUCTL_TEST_SILENCE_S={silence_s}"]
        self.daemon = Daemon(
            home,
            WORKERS,
            module=FAULTY,
            device=device,
            more=more,
            under=("env", *environ, *under),
            fork_servers=fork_servers,
        )
        quick = self.daemon.config.read_text().replace('max = "1s"', 'max = "300ms"')
        self.daemon.config.write_text(quick)
        self.memory_mib: list[tuple[float, float]] = []
        self.start()
        self.daemon.client().load(MODEL)
        self.picture = self.daemon.draw(0)
        self._journal = home / "journal"
        self._journal.unlink()

    def start(self) -> None:
        self.daemon.start()
        self._process = psutil.Process(self.daemon.process.pid)
        threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()

    def _watch(self, process: psutil.Process) -> None:
        began = time.monotonic()
        try:
            while (size := process.memory_info().rss) > 0:  # nothing is left of a zombie
                self.memory_mib.append((time.monotonic() - began, size / MIB))
                time.sleep(SAMPLE_S)
        except psutil.NoSuchProcess:
            return

    @property
    def descriptors(self) -> int:
        return self._process.num_fds()

    def closes_down_to(self, number: int, seconds: float) -> bool:
        """Whether the daemon has no more descriptors than that, at the latest after a while."""
        deadline = time.monotonic() + seconds
        while self.descriptors > number:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def growth_mib_per_h(self) -> float | None:
        """Slope of the daemon's memory after its warm-up; ``None`` for a run that is too short."""
        points = [each for each in self.memory_mib if each[0] > WARM_UP_S]
        if len(points) < SLOPE_POINTS:
            return None
        seconds, sizes = zip(*points, strict=True)
        return statistics.linear_regression(seconds, sizes).slope * 3600

    def processes(self) -> list[int]:
        """The daemon and its workers."""
        return [self.daemon.process.pid, *self.daemon.worker_pids()]

    def wrongs(self) -> list[str]:
        """What is not as it should be once the attack is over and the models were asked for."""
        found = [f"job {seed} ran {count} times" for seed, count in self._runs() if count > 1]
        self.daemon.inject()
        self.daemon.wait_for(lambda status: not unready(status), BACK_S)
        self.daemon.client().load(MODEL)
        if set(self.daemon.states(MODEL)) != {"loaded"}:
            found.append(f"models are {self.daemon.states(MODEL)}")
        if {self.daemon.draw(gpu) for gpu in range(WORKERS)} != {self.picture}:
            found.append("a seeded picture is another one")
        return found

    def _runs(self) -> list[tuple[str, int]]:
        """How often each job was begun, by its seed."""
        seeds = self._journal.read_text().split() if self._journal.exists() else []
        return Counter(seeds).most_common()

    def end(self) -> list[str]:
        """Stop the daemon; what it left behind."""
        pids = self.processes()
        status = self.daemon.stop(signal.SIGTERM)
        found = [] if status == 0 else [f"the daemon left with status {status}"]
        found += [f"process {pid} is left" for pid in pids if runs(pid)]
        found += [f"file {path} is left" for path in self.daemon.home.glob("*.sock")]
        return found


def unready(status: dict) -> list[int]:
    """The GPUs whose worker is not there."""
    return [each["gpu"] for each in status["workers"] if each["state"] != "ready"]


def runs(pid: int) -> bool:
    """False also for one that waits to be reaped."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
