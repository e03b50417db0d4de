"""Unload and reload of a FLUX-sized pipeline: ours against what people use today, in one run.

Needs CUDA; with two GPUs or more the rows about several GPUs are measured as well. Arms take turns
forth and back (ABBA), so that a machine that slows down slows all of them. Writes results.json,
weights.png where matplotlib is installed, and the table of docs/performance.md::

    python benchmarks/weights.py --out results --table docs/performance.md
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # children are forked: no CUDA in this process

import argparse
import datetime as dt
import importlib.util
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pynvml

from benchmarks import weights_arms, weights_report
from gpuctld import host_store

Sample = dict[str, Any]


class Arm:
    """A process that runs one arm on some GPUs."""

    def __init__(self, arm: type, gpus: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._channel, theirs = context.Pipe()
        self._process = context.Process(
            target=weights_arms.serve, args=(arm, gpus, theirs, *arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def send(self, name: str, **keywords: Any) -> None:
        self._channel.send((name, keywords))

    def receive(self) -> Any:
        answer = self._channel.recv()
        if isinstance(answer, dict) and "error" in answer:
            raise SystemExit(answer["error"])
        return answer

    def call(self, name: str, **keywords: Any) -> Any:
        self.send(name, **keywords)
        return self.receive()

    def end(self) -> None:
        self._channel.send(("leave", {}))
        self._process.join(30)
        self._process.kill()


def together(arms: list[Arm], name: str, each: list[dict[str, Any]] | None = None) -> Sample:
    """Broadcast a command; seconds from the command to the last answer, and the answers."""
    started = time.perf_counter()
    for number, arm in enumerate(arms):
        arm.send(name, **(each[number] if each else {}))
    answers = [arm.receive() for arm in arms]
    return {"seconds": time.perf_counter() - started, "answers": answers}


class Bench:
    """One run; ``found`` collects a list of samples per measurement."""

    def __init__(self, gpus: int, options: argparse.Namespace, home: Path) -> None:
        self.gpus, self.cycles, self.others = gpus, options.cycles, options.others
        self._base = _nvml_used()
        self.found: dict[str, list[Any]] = {}
        self._descriptor = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
        self._paths = tuple(str(home / f"peer-{gpu}") for gpu in range(gpus))
        self._token = 0
        self.ours = [
            Arm(weights_arms.Slabs, str(gpu), self._descriptor, path)
            for gpu, path in enumerate(self._paths)
        ]
        self._timed("build", lambda: self._build(options.scale))

    def _build(self, scale: float) -> None:
        self.layout = self.ours[0].call("build", scale=scale)

    def _timed(self, what: str, step: Any) -> None:
        started = time.perf_counter()
        step()
        print(f"{what}: {time.perf_counter() - started:.1f} s", flush=True)

    def _note(self, name: str, sample: Any) -> None:
        self.found.setdefault(name, []).append(sample)

    def run(self) -> None:
        self._timed("attach", self._attach)
        self._timed("floor, verify and first steps", self._details)
        self._timed("suspend", self._suspend)
        for arm in ("module_threads", "module_processes", "saver"):
            self._timed(f"{arm} and ours in turns", lambda arm=arm: self._turns(arm))
        if self.gpus > 1:
            self._timed("neighbour", self._neighbour)

    def _attach(self) -> None:
        for arm in self.ours:
            self._note("attach", arm.call("attach", layout=self.layout))
        status = os.fstat(self._descriptor)
        self._note("host", {"file": status.st_blocks * 512, "model": self.layout["slab_bytes"]})

    def _details(self) -> None:
        for _ in range(3):
            self._note("warm_forward", together(self.ours, "forward"))
        for _ in range(5):
            self._note("floor", together(self.ours, "floor"))
        for _ in range(5):
            self._cycle("ours_alone", fanout=False)
            self._note("first_forward", together(self.ours, "forward"))
            self._note("second_forward", together(self.ours, "forward"))
        for _ in range(5):
            together(self.ours, "unload")
            each = [{"verify": True}] * self.gpus
            self._note("verified_reload", together(self.ours, "reload", each))

    def _cycle(self, name: str, *, fanout: bool) -> None:
        self._note(f"{name}_unload", together(self.ours, "unload"))
        each = [self._meeting(rank) if fanout else {} for rank in range(self.gpus)]
        self._token += 1
        self._note(f"{name}_reload", together(self.ours, "reload", each))

    def _meeting(self, rank: int) -> dict[str, Any]:
        return {"token": str(self._token), "rank": rank, "paths": self._paths}

    def _turns(self, other: str) -> None:
        """Ours, the other as often as it shall, ours."""
        if other == "module_processes" and self.gpus == 1:
            return  # one process with one thread either way
        if other == "saver" and importlib.util.find_spec("torch_memory_saver") is None:
            return
        self._ours_turn()
        together(self.ours, "unload")
        arms = self._start(other)
        if other != "saver":
            together(arms, "reload")
        for _ in range(self.others):
            self._note(f"{other}_unload", together(arms, "unload"))
            self._note(f"{other}_reload", together(arms, "reload"))
        if len(arms) == self.gpus and other.startswith("module"):
            self._checkpoint(arms)
        for arm in arms:
            arm.end()
        together(self.ours, "reload")
        self._ours_turn()

    def _ours_turn(self) -> None:
        for _ in range(self.cycles // 2):
            self._cycle("ours", fanout=self.gpus > 1)

    def _start(self, other: str) -> list[Arm]:
        every = [str(gpu) for gpu in range(self.gpus)]
        if other == "saver":
            return [Arm(weights_arms.Saver, gpu, self.layout["slab_bytes"]) for gpu in every]
        groups = [",".join(every)] if other == "module_threads" else every
        arguments = (self._descriptor, self.layout)
        return [Arm(weights_arms.ModuleTo, gpus, *arguments) for gpus in groups]

    def _checkpoint(self, arms: list[Arm]) -> None:
        """The driver's checkpoint of processes that have everything on their GPU."""
        for _ in range(2):
            self._note("checkpoint_unload", together(arms, "suspend"))
            self._note("checkpoint_reload", together(arms, "wake"))
        together(arms, "clear")

    def _suspend(self) -> None:
        for _ in range(4):
            together(self.ours, "unload")
            memory = together(self.ours, "memory")["answers"]
            self._note("left_after_unload", memory[0])
            self._note("unpin", together(self.ours, "pins", [{"on": False}] * self.gpus))
            self._note("suspend", together(self.ours, "suspend"))
            self._note("left_after_suspend", {"used": _nvml_used() - self._base})
            self._note("wake", together(self.ours, "wake"))
            self._note("pin", together(self.ours, "pins", [{"on": True}] * self.gpus))
            together(self.ours, "reload")

    def _neighbour(self) -> None:
        """Steps on GPU 1 while GPU 0 does something else."""
        together(self.ours, "unload")
        self.ours[1].call("steps", seconds=1.0)
        for what in ("idle", "pins", "cycles"):
            self.ours[0].send("churn", seconds=4.0, what=what)
            self._note(f"neighbour_{what}", self.ours[1].call("steps", seconds=3.5))
            self.ours[0].receive()

    def end(self) -> None:
        for arm in self.ours:
            arm.end()


def _nvml_used() -> int:
    """Of the first GPU's memory, by everybody."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of layers")
    parser.add_argument("--cycles", type=int, default=10, help="of ours, per arm it is compared to")
    parser.add_argument("--others", type=int, default=2, help="cycles of each other arm")
    parser.add_argument("--out", type=Path, default=Path("bench-output"))
    parser.add_argument("--table", type=Path, help="write the table as Markdown")
    options = parser.parse_args()
    pynvml.nvmlInit()
    gpus = pynvml.nvmlDeviceGetCount()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(gpus, options, Path(home))
        results = {"about": _about(gpus, options, bench.layout), "found": bench.found}
        try:
            bench.run()
        finally:  # what was measured before a failure is worth keeping
            (options.out / "results.json").write_text(json.dumps(results))
        bench.end()
    weights_report.write(results, options.out, options.table)
    return 0


def _about(gpus: int, options: argparse.Namespace, layout: dict[str, Any]) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "host": f"{gpus} x {pynvml.nvmlDeviceGetName(handle)}, {os.cpu_count()} cores, "
        f"{host_store.available_bytes() / 1e9:.0f} GB of host memory available, "
        f"driver {pynvml.nvmlSystemGetDriverVersion()}, Python {platform.python_version()}",
        "command": f"benchmarks/weights.py --scale {options.scale} --cycles {options.cycles} "
        f"--others {options.others}",
        "gpus": gpus,
        "bytes": layout["slab_bytes"],
    }


if __name__ == "__main__":
    sys.exit(main())
