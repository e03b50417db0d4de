"""The whole service with a FLUX-sized pipeline on every GPU: LOAD, and the commands as typed.

Needs CUDA, and room for twice the model in host memory and once on the disk. Writes what it saw
as Markdown, each part as soon as it is there, and says how far it is::

    python benchmarks/service.py --folder /var/tmp --table docs/performance-service.md
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the child that uses CUDA is forked

import argparse
import datetime as dt
import hashlib
import multiprocessing
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pynvml
import torch
from tests.integration.daemon import Daemon

from benchmarks import flux_sized

MODEL = "flux"
LOADS = 2
PROMPT = "w2 w3 w4"
LOG_TAIL = 4000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of layers")
    parser.add_argument("--folder", type=Path, help="where the weight files go")
    parser.add_argument("--devices", help="comma-separated; the default is every GPU once")
    parser.add_argument("--table", type=Path, help="write what was seen as Markdown")
    options = parser.parse_args()
    pynvml.nvmlInit()
    every = ",".join(f"cuda:{gpu}" for gpu in range(pynvml.nvmlDeviceGetCount()))
    devices = options.devices or every
    with tempfile.TemporaryDirectory(dir=options.folder) as home:
        model = Path(home) / MODEL
        child = multiprocessing.get_context("fork").Process(
            target=flux_sized.save, args=(model, options.scale, torch.device("cuda:0"))
        )
        child.start()
        child.join()
        say("the model is written")
        parts = []
        for part in (_about(options.scale, devices), *measure(Path(home), model, devices)):
            parts.append(part)
            if options.table:
                options.table.write_text("".join(parts))
        say("done")
    print("".join(parts))
    return 0


BEGAN = time.monotonic()


def say(text: str) -> None:
    """Progress, with the seconds since the beginning."""
    print(f"{time.monotonic() - BEGAN:7.1f} s  {text}", file=sys.stderr, flush=True)


def _about(scale: float, devices: str) -> str:
    count = pynvml.nvmlDeviceGetCount()
    name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    return f"""# The service with a FLUX-sized model

Written by `benchmarks/service.py`; no figure here was typed by hand.

- Date: {dt.datetime.now(dt.UTC).date().isoformat()}
- Host: {count} x {name}, {os.cpu_count()} cores, Python {platform.python_version()}
- Command: `benchmarks/service.py --scale {scale} --devices {devices}`

"""


def measure(home: Path, model: Path, devices: str) -> Iterator[str]:
    """Start a daemon, load, type the commands, and stop it: the parts of the page."""
    more = f'[models.{MODEL}]\npath = "{model}"\ndtype = "bfloat16"\n'
    more += f"[models.{MODEL}.defaults]\nnum_inference_steps = 2\nheight = 512\nwidth = 512\n"
    daemon = Daemon(home, 1, more=more, device=devices).start()
    say("the daemon is up")
    try:
        yield _loads(daemon)
        yield from _transcript(daemon)
    finally:
        seconds = _stop(daemon)
    yield f"Stopped in {seconds:.1f} s.\n"


def _stop(daemon: Daemon) -> float:
    """Seconds that the daemon takes to leave. One that does not is shown and killed."""
    started = time.monotonic()
    try:
        daemon.stop()
    except subprocess.TimeoutExpired:
        say("it does not stop; the end of its log:\n" + daemon.log[-LOG_TAIL:])
        os.killpg(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait()
        raise
    say("stopped")
    return time.monotonic() - started


def _loads(daemon: Daemon) -> str:
    """Seconds of a LOAD whose files are in the page cache, on one GPU and on all."""
    client = daemon.client(timeout=300)
    client.load(MODEL)  # the first one brings the files into the page cache
    one, every = [], []
    for _ in range(LOADS):
        client.drop(MODEL)
        one.append(client.load(MODEL, gpus=[0])["duration_s"])
        client.drop(MODEL)
        every.append(client.load(MODEL)["duration_s"])
        say(f"LOAD: one GPU {one[-1]:.2f} s, all {every[-1]:.2f} s")
    ratio = statistics.median(every) / statistics.median(one)
    rows = client.status()["models"]
    size = next(row["host_bytes"] for row in rows if row["model"] == MODEL)
    return f"""| LOAD of {size / 1e9:.1f} GB from page-cached files | seconds |
|---|---|
| on one GPU | {", ".join(f"{value:.2f}" for value in one)} |
| on all GPUs, in sequence, one read of the files | {", ".join(f"{value:.2f}" for value in every)} |
| ratio of the medians (target <= 1.3 on two) | {ratio:.2f} |

"""


def _transcript(daemon: Daemon) -> Iterator[str]:
    gpus = range(len(daemon.client().status()["workers"]))
    before = [_picture(daemon, gpu) for gpu in gpus]
    say("pictures")
    for words in _commands():
        yield _typed(daemon, *words) + "\n"
        say(" ".join(words))
    after = [_picture(daemon, gpu) for gpu in gpus]
    say("pictures")
    same = "equal" if len({*before, *after}) == 1 else "DIFFERENT"
    yield f"Seeded pictures of all GPUs, before and after, bit by bit: {same}.\n\n"


def _commands() -> list[list[str]]:
    cycle = [["unload"], ["reload"]]
    rest = [["unload"], ["reload", "--no-fanout"], ["unload"], ["reload", "--verify"]]
    return [*cycle, *cycle, *rest, ["unload", "--suspend"], ["reload"], ["status"]]


def _typed(daemon: Daemon, *words: str) -> str:
    time.sleep(1.0)  # a person types
    used = _used()
    done = daemon.cli(*words, check=None)
    text = f"    $ gpuctl {' '.join(words)}\n"
    text += "".join(f"    {line}\n" for line in done.stdout.rstrip().splitlines())
    freed = (used - _used()) / 2**30
    return f"{text}    # the driver: {freed:+.1f} GiB free on all GPUs together\n"


def _used() -> int:
    handles = [pynvml.nvmlDeviceGetHandleByIndex(gpu) for gpu in range(pynvml.nvmlDeviceGetCount())]
    return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)


def _picture(daemon: Daemon, gpu: int) -> str:
    [image] = daemon.client(timeout=120).generate(MODEL, PROMPT, seed=1, options={"gpu": gpu})
    return hashlib.sha256(image.tobytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
