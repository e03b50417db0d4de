"""What handing the GPUs over costs beside the bare unload and reload.

Rounds of ``gpuctl run`` with a program that, on GPUs, takes nearly the whole card. For each round:
from the start of ``gpuctl`` to the program's first word, and from the program's last word to the
models' return, against the unload and reload that the daemon reports for the same round::

    python benchmarks/handover.py                       # two CPU devices, the demo's model
    python benchmarks/handover.py --devices cuda:0,cuda:1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.integration.daemon import Daemon, states

MODEL = "shapes"
PROMPT = "a small red circle on white"
HEADROOM = 3 << 30
"""Bytes of a card that the program leaves to contexts: its own and the workers'."""

PROGRAM = """
import sys, time
print(time.monotonic(), flush=True)
size = int(sys.argv[1])
if size:
    import torch
    for gpu in range(torch.cuda.device_count()):
        torch.empty(size, dtype=torch.uint8, device=f"cuda:{gpu}")
print(time.monotonic(), flush=True)
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
    total = client.status()["workers"][0]["memory"]["total"]
    need = total - HEADROOM if on_gpus else 0
    expected = _pictures(daemon)
    rounds = []
    for _ in range(count):
        rounds.append(_round(daemon, need))
        if _pictures(daemon) != expected:
            raise SystemExit("a picture differs after the round")
    return rounds


def _round(daemon: Daemon, need: int) -> Round:
    size = max(0, need - HEADROOM)
    words = ["--need", str(need)] if need else []
    unloads, reloads = _bare(daemon)
    started = time.monotonic()
    done = daemon.cli("run", *words, "--", sys.executable, "-c", PROGRAM, str(size))
    ended = time.monotonic()
    first, last = (float(line) for line in done.stdout.split())
    if set(states(daemon.client().status(), MODEL)) != {"loaded"}:
        raise SystemExit("a model is not back after the round")
    bare = _bare_program()
    return {
        "before_s": first - started,
        "after_s": ended - last,
        "unload_s": unloads,
        "reload_s": reloads,
        "gpuctl_start_s": bare["gpuctl"],
        "program_start_s": bare["program"],
    }


def _bare(daemon: Daemon) -> tuple[float, float]:
    client = daemon.client()
    return client.unload()["duration_s"], client.reload()["duration_s"]


def _bare_program() -> Round:
    """What starting the two interpreters takes by itself, in this very moment."""
    times = {}
    commands = {"program": "pass", "gpuctl": "import gpuctl.cli.lease, gpuctl.run"}
    for name, code in commands.items():
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", code], check=True)
        times[name] = time.monotonic() - started
    return times


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

    starts = median("gpuctl_start_s") + median("program_start_s")
    before = median("before_s") - median("unload_s")
    after = median("after_s") - median("reload_s")
    return f"""{len(rounds)} rounds, medians in ms; every seeded picture equal afterwards
start of gpuctl to the program's first word  {median("before_s"):7.1f}
  bare unload                                {median("unload_s"):7.1f}
the program's last word to loaded            {median("after_s"):7.1f}
  bare reload                                {median("reload_s"):7.1f}
on top of unload and reload                  {before + after:7.1f}
  starting two Pythons                       {starts:7.1f}
hand-over by itself                          {before + after - starts:7.1f}   goal: <= 150"""


if __name__ == "__main__":
    sys.exit(main())
