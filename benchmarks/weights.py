"""Unload and reload of a FLUX-sized pipeline: ours against what people use today, in one run.

Needs CUDA; with two GPUs or more the rows about several GPUs are measured as well. Arms take turns
forth and back (ABBA), so that a machine that slows down slows all of them. What everybody wants to
know comes first and the slow arms last: results.json is written after every sample, and a run that
is cut off has measured what it has measured. At the end come the table of docs/performance.md, and
weights.png where matplotlib is installed::

    python benchmarks/weights.py --out results --table docs/performance.md

Both can be had later, and elsewhere, from results.json: see benchmarks/weights_report.py.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # children are forked: no CUDA in this process

import argparse
import contextlib
import datetime as dt
import importlib.util
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pynvml

from benchmarks import weights_arms, weights_report
from benchmarks.weights_results import Results
from gpuctld import host_store

Sample = dict[str, Any]

PATIENCE_S = 30.0
"""For the end of an arm's process, which gives tens of gigabytes back."""


class ArmFailed(Exception):
    """An arm's process has ended, with the last line of its traceback."""


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
        try:
            self._channel.send((name, keywords))
        except OSError:  # it has ended; what it left is still to be received
            return

    def receive(self) -> Any:
        try:
            answer = self._channel.recv()
        except (EOFError, OSError):
            raise ArmFailed("the process ended without a word") from None
        if isinstance(answer, dict) and "error" in answer:
            print(answer["error"], file=sys.stderr, flush=True)
            raise ArmFailed(answer["error"].strip().splitlines()[-1])
        return answer

    def call(self, name: str, **keywords: Any) -> Any:
        self.send(name, **keywords)
        return self.receive()

    def end(self) -> None:
        self.send("leave")
        self._process.join(PATIENCE_S)
        self._process.kill()
        self._process.join()


def together(arms: list[Arm], name: str, each: list[dict[str, Any]] | None = None) -> Sample:
    """Broadcast a command; seconds from the command to the last answer, and the answers."""
    started = time.perf_counter()
    for number, arm in enumerate(arms):
        arm.send(name, **(each[number] if each else {}))
    answers = [arm.receive() for arm in arms]
    return {"seconds": time.perf_counter() - started, "answers": answers}


def say(text: str) -> None:
    """Progress, seen at once."""
    print(f"{dt.datetime.now(dt.UTC):%H:%M:%S} {text}", flush=True)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Say when a part of the run begins, and how long it took."""
    started = time.perf_counter()
    say(f"{what} ...")
    yield
    say(f"{what}: {time.perf_counter() - started:.1f} s")


class Bench:
    """One run. ``cycles``: of ours, between others; ``others``: of each arm it is compared to."""

    def __init__(self, gpus: int, options: argparse.Namespace, home: Path) -> None:
        self.gpus, self.cycles, self.others = gpus, options.cycles, options.others
        self._base = _nvml_used()
        self._descriptor = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
        self._paths = tuple(str(home / f"peer-{gpu}") for gpu in range(gpus))
        self._token = 0
        self.ours = [
            Arm(weights_arms.Slabs, str(gpu), self._descriptor, path)
            for gpu, path in enumerate(self._paths)
        ]
        with timed("build"):
            self.layout = self.ours[0].call("build", scale=options.scale)
        about = _about(gpus, options, self.layout)
        self._results = Results(options.out / "results.json", about)
        self._note = self._results.note

    def run(self) -> None:
        with timed("attach"):
            self._attach()
        with timed("ours"):
            self._ours_turn()
        with timed("floor, verify and first steps"):
            self._details()
        with timed("suspend"):
            self._suspend()
        if self.gpus > 1:
            with timed("neighbour"):
                self._neighbour()
        for arm in self._arms():
            with timed(f"{arm} and ours in turns"):
                self._turns(arm)
        self._results.end()

    def _arms(self) -> Iterator[str]:
        yield "module_threads"
        if self.gpus > 1:  # else it is one process with one thread either way
            yield "module_processes"
        if importlib.util.find_spec("torch_memory_saver") is not None:
            yield "saver"

    def _attach(self) -> None:
        for arm in self.ours:
            self._note("attach", arm.call("attach", layout=self.layout))
        status = os.fstat(self._descriptor)
        self._note("host", {"file": status.st_blocks * 512, "model": self.layout["slab_bytes"]})

    def _ours_turn(self) -> None:
        for _ in range(-(-self.cycles // 2)):
            self._cycle("ours", fanout=self.gpus > 1)

    def _cycle(self, name: str, *, fanout: bool) -> None:
        self._note(f"{name}_unload", together(self.ours, "unload"))
        each = [self._meeting(rank) if fanout else {} for rank in range(self.gpus)]
        self._token += 1
        self._note(f"{name}_reload", together(self.ours, "reload", each))

    def _meeting(self, rank: int) -> dict[str, Any]:
        return {"token": str(self._token), "rank": rank, "paths": self._paths}

    def _details(self) -> None:
        for _ in range(3):
            self._note("warm_forward", together(self.ours, "forward"))
        for _ in range(self.cycles):
            self._note("floor", together(self.ours, "floor"))
        for _ in range(self.cycles):
            self._cycle("ours_alone", fanout=False)
            self._note("first_forward", together(self.ours, "forward"))
            self._note("second_forward", together(self.ours, "forward"))
        for _ in range(self.cycles):
            together(self.ours, "unload")
            each = [{"verify": True}] * self.gpus
            self._note("verified_reload", together(self.ours, "reload", each))

    def _suspend(self) -> None:
        for _ in range(self.cycles):
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
        """Steps on GPU 1 while GPU 0 does something else.

        In turns, forth and back: the slowest steps of one and the same second are up to half as
        slow again as those of the next, whatever the other GPU does.
        """
        together(self.ours, "unload")
        self.ours[1].call("steps", seconds=1.0)
        order = ("idle", "pins", "cycles")
        for _ in range(-(-self.cycles // 2)):
            for what in (*order, *reversed(order)):
                self.ours[0].send("churn", seconds=1.2, what=what)
                self._note(f"neighbour_{what}", self.ours[1].call("steps", seconds=1.0))
                self.ours[0].receive()
        self.ours[0].call("unload")  # the cycles have left it loaded
        together(self.ours, "reload")

    def _turns(self, other: str) -> None:
        """Ours, the other as often as it shall, ours. One that fails is noted and left out."""
        self._ours_turn()
        together(self.ours, "unload")
        arms = self._start(other)
        with self._noting_failure(other):
            self._others_turn(other, arms)
        for arm in arms:
            arm.end()
        together(self.ours, "reload")
        self._ours_turn()

    @contextlib.contextmanager
    def _noting_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except ArmFailed as failed:
            self._results.fail(name, str(failed))
            say(f"{name} failed: {failed}")

    def _start(self, other: str) -> list[Arm]:
        every = [str(gpu) for gpu in range(self.gpus)]
        if other == "saver":
            return [Arm(weights_arms.Saver, gpu, self.layout["slab_bytes"]) for gpu in every]
        groups = [",".join(every)] if other == "module_threads" else every
        arguments = (self._descriptor, self.layout)
        return [Arm(weights_arms.ModuleTo, gpus, *arguments) for gpus in groups]

    def _others_turn(self, other: str, arms: list[Arm]) -> None:
        """Processes that have all on one GPU are those that the driver's checkpoint can move too.

        It takes its turns between theirs: setting them up takes as long as a few cycles.
        """
        if other == "saver":
            self._cycles(other, arms, self.others)
            return
        together(arms, "reload")
        self._cycles(other, arms, self.others - self.others // 2)
        if len(arms) == self.gpus:
            with self._noting_failure("checkpoint"):
                self._cycles("checkpoint", arms, self.others, ("suspend", "wake"))
        self._cycles(other, arms, self.others // 2)

    def _cycles(
        self, name: str, arms: list[Arm], count: int, verbs: tuple[str, str] = ("unload", "reload")
    ) -> None:
        for _ in range(count):
            down, up = together(arms, verbs[0]), together(arms, verbs[1])
            self._note(f"{name}_unload", down)
            self._note(f"{name}_reload", up)
            say(f"{name}: unload {down['seconds']:.2f} s, reload {up['seconds']:.2f} s")

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
    parser.add_argument("--others", type=int, default=10, help="cycles of each other arm")
    parser.add_argument("--out", type=Path, default=Path("bench-output"))
    parser.add_argument("--table", type=Path, help="write the table as Markdown")
    options = parser.parse_args()
    pynvml.nvmlInit()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(pynvml.nvmlDeviceGetCount(), options, Path(home))
        bench.run()
        bench.end()
    weights_report.write(options.out / "results.json", options.out, options.table)
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
