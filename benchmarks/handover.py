"""What handing the GPUs over costs beside the bare unload and reload.

Rounds of ``gpuctl run`` with a command that, on GPUs, takes nearly the whole card. For each round:
from the start of ``gpuctl`` to the command's first instruction, and from the command's end until
the last model is loaded, against an unload and a reload by themselves just before::

    python benchmarks/handover.py                       # two CPU devices, the demo's model
    python benchmarks/handover.py --devices cuda:0,cuda:1
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.integration.daemon import Daemon, states

from gpuctl import GpuctlError

COMMAND = Path(sys.executable).with_name("gpuctl")
"""As installed: a shell starts no other."""

MODEL = "shapes"
PROMPT = "a small red circle on white"
HEADROOM = 3 << 30
"""Bytes of a card that the program leaves to contexts: its own and the workers'."""

TIMED = 'date +%s.%N; "$@"; date +%s.%N'
"""A shell that says when it begins, and when the program that it runs has ended."""

IMPORTS = "import gpuctl.cli.lease, gpuctl.run, time; print(time.time())"

PROGRAM = """
import sys, torch
for gpu in range(torch.cuda.device_count()):
    torch.empty(int(sys.argv[1]), dtype=torch.uint8, device=f"cuda:{gpu}")
"""

Round = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", default="cpu,cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="every round instead of medians")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        devices = options.devices.split(",")
        daemon = Daemon(Path(home), 1, device=options.devices).start()
        try:
            rounds = measure(daemon, options.rounds, on_gpus=devices[0] != "cpu")
        finally:
            daemon.stop()
    print(json.dumps(rounds) if options.json else _table(rounds))
    return 0


def measure(daemon: Daemon, count: int, *, on_gpus: bool) -> list[Round]:
    """Seconds of each round.

    Raises:
        SystemExit: a picture differs afterwards, or a model is not back.
    """
    client = daemon.client()
    client.load(MODEL)
    workers = client.status()["workers"]
    need = workers[0]["memory"]["total"] - HEADROOM if on_gpus else 0
    arrivals = Arrivals(daemon, len(workers))
    expected = _pictures(daemon)  # which takes longer than to subscribe
    rounds = []
    for _ in range(count):
        rounds.append(_round(daemon, need, arrivals))
        if _pictures(daemon) != expected:
            raise SystemExit("a picture differs after the round")
    return rounds


class Arrivals:
    """When the daemon said that a model is loaded on the last of its workers."""

    def __init__(self, daemon: Daemon, workers: int) -> None:
        self._workers = workers
        self._seen: queue.Queue[float] = queue.Queue()
        events = daemon.client().events()
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: Iterator[dict[str, Any]]) -> None:
        with contextlib.suppress(GpuctlError):  # the daemon ends before we do
            for event in events:
                if event["event"] == "residency" and event["state"] == "loaded":
                    self._seen.put(event["at"])

    def wait(self) -> float:
        """The time of the last of them, one for each worker; seconds since the epoch."""
        return max(self._seen.get(timeout=60) for _ in range(self._workers))


def _round(daemon: Daemon, need: int, arrivals: Arrivals) -> Round:
    words = ["--need", str(need)] if need else []
    program = [sys.executable, "-c", PROGRAM, str(need - HEADROOM)] if need else ["true"]
    unload, reload = _bare(daemon)
    arrivals.wait()
    started = time.time()
    done = _gpuctl(daemon, "run", *words, "--", "sh", "-c", TIMED, "sh", *program)
    ended = arrivals.wait()
    first, last = (float(line) for line in done.split())
    if set(states(daemon.client().status(), MODEL)) != {"loaded"}:
        raise SystemExit("a model is not back after the round")
    return {
        "before_s": first - started,
        "after_s": ended - last,
        "unload_s": unload,
        "reload_s": reload,
        "gpuctl_start_s": _start_of_gpuctl(),
    }


def _gpuctl(daemon: Daemon, *words: str) -> str:
    """Its output. The tests' PYTHONPATH would have every import look into more folders.

    Raises:
        SystemExit: it failed.
    """
    environ = {**os.environ, "GPUCTL_SOCKET": daemon.endpoint}
    done = subprocess.run(
        [COMMAND, *words], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def _bare(daemon: Daemon) -> tuple[float, float]:
    client = daemon.client()
    return client.unload()["duration_s"], client.reload()["duration_s"]


def _start_of_gpuctl() -> float:
    """What its interpreter and its imports take by themselves, in this very moment."""
    started = time.time()
    python = [sys.executable, "-P", "-c", IMPORTS]
    done = subprocess.run(python, capture_output=True, text=True, check=True)
    return float(done.stdout) - started


def _pictures(daemon: Daemon) -> set[str]:
    client = daemon.client(timeout=120)
    workers = client.status()["workers"]
    return {
        hashlib.sha256(image.tobytes()).hexdigest()
        for worker in workers
        for image in client.generate(MODEL, PROMPT, seed=1, options={"gpu": worker["gpu"]})
    }


def _table(rounds: list[Round]) -> str:
    def median(name: str) -> float:
        return statistics.median(each[name] for each in rounds) * 1e3

    before = median("before_s") - median("unload_s")
    after = median("after_s") - median("reload_s")
    start = median("gpuctl_start_s")
    return f"""{len(rounds)} rounds, medians in ms; every seeded picture equal afterwards
start of gpuctl to the command's first instruction  {median("before_s"):7.1f}
  bare unload                                       {median("unload_s"):7.1f}
the command's end to loaded                         {median("after_s"):7.1f}
  bare reload                                       {median("reload_s"):7.1f}
on top of unload and reload                         {before + after:7.1f}   goal: <= 150
  starting the Python of gpuctl                     {start:7.1f}
  the hand-over                                     {before + after - start:7.1f}"""


if __name__ == "__main__":
    sys.exit(main())
