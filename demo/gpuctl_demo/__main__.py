"""``make demo``: the loop that gpuctl is for, on a model that ships with it.

    edit a category -> unload the diffusion model from every GPU -> score -> reload -> next category

Starts a daemon of its own, draws shapes, edits them in five categories on all workers, scores
the edits while the devices are free, and prints what doing it all at once has saved.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
from PIL import Image
from rich.console import Console
from rich.table import Table

from gpuctl import Client
from gpuctl_demo import GUIDANCE, IMAGE_GUIDANCE, STEPS, model_path
from gpuctl_demo.drawing import draw
from gpuctl_demo.scenes import ATTRIBUTES, Edit, edits
from gpuctl_demo.sheet import write_sheet

MODEL = "shapes-edit"
SEED = 11
START_S = 120.0

CONFIG = """\
[daemon]
devices = {devices}
socket = "ipc://{home}/gpuctl.sock"
state_dir = "{home}/state"

[models.shapes]
path = "{shapes}"

[models.shapes-edit]
path = "{edit}"

[models.shapes-edit.defaults]
num_inference_steps = {steps}
guidance_scale = {guidance}
image_guidance_scale = {image_guidance}
"""


@attrs.frozen
class Timing:
    """Seconds of one operation over all workers: one after the other, and all at once."""

    operation: str
    serial: float
    parallel: float

    @property
    def ratio(self) -> float:
        return self.serial / self.parallel


@attrs.frozen
class Round:
    """One category: its edits, the images that came out, and how the time went."""

    category: str
    edits: list[Edit]
    images: list[Image.Image]
    right: int
    draw_s: float
    unload_s: float
    score_s: float
    reload_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 100)
    with tempfile.TemporaryDirectory(prefix="gpuctl-demo-") as home, _daemon(Path(home), console):
        client = Client(f"ipc://{home}/gpuctl.sock")
        timings = _load_and_compare(client, console)
        rounds = [_round(client, category, options.images, console) for category in ATTRIBUTES]
        _check(client)
    sheet = write_sheet(options.out, rounds)
    _report(console, timings, rounds)
    console.print(f"\nContact sheet: [bold]{sheet}[/]")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpuctl_demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for images")
    parser.add_argument("--images", type=int, default=6, help="edits per category")
    return parser


# --- the daemon -----------------------------------------------------------------------------


@contextlib.contextmanager
def _daemon(home: Path, console: Console) -> Iterator[None]:
    """A private daemon on every CUDA GPU, else on two simulated devices."""
    devices = '"auto"' if _has_gpu() else '["cpu", "cpu"]'
    config = home / "config.toml"
    config.write_text(
        CONFIG.format(
            devices=devices,
            home=home,
            shapes=model_path("shapes"),
            edit=model_path("shapes-edit"),
            steps=STEPS,
            guidance=GUIDANCE,
            image_guidance=IMAGE_GUIDANCE,
        )
    )
    console.print("Starting a private daemon ...")
    with (home / "daemon.log").open("w") as log:
        process = subprocess.Popen(  # noqa: S603  our own program
            [sys.executable, "-m", "gpuctld", "--config", str(config)],
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, home)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def _has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and Path("/dev/nvidiactl").exists()


def _wait_until_ready(process: subprocess.Popen[bytes], home: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(Exception):
            if Client(f"ipc://{home}/gpuctl.sock", timeout=2).status()["daemon"]["ready"]:
                return
        time.sleep(0.1)
    raise SystemExit(f"the daemon did not start:\n{(home / 'daemon.log').read_text()}")


# --- the loop -------------------------------------------------------------------------------


def _load_and_compare(client: Client, console: Console) -> list[Timing]:
    """Load in sequence, then time unload and reload both ways."""
    loaded = client.load(MODEL, serial=True)
    names = ", ".join(row["device"] for row in loaded["workers"])
    console.print(f"Loaded [bold]{MODEL}[/] in sequence on {names}: {loaded['duration_s']:.2f} s")
    gpus = [row["gpu"] for row in loaded["workers"]]
    unload_serial = sum(client.unload(MODEL, gpus=[gpu])["duration_s"] for gpu in gpus)
    reload_serial = client.reload(MODEL, parallel=False)["duration_s"]
    unload = client.unload(MODEL)["duration_s"]
    reload = client.reload(MODEL)["duration_s"]
    return [Timing("unload", unload_serial, unload), Timing("reload", reload_serial, reload)]
