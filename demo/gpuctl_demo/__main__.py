"""``make demo``: the loop that gpuctl is for, on a model that ships with it.

    edit a category -> unload the diffusion model from every GPU -> score -> reload -> next category

Starts a daemon of its own, draws shapes, edits them in five categories on all workers, scores
the edits while the devices are free, and prints what doing it all at once has saved.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import attrs
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gpuctl import Client, GpuctlError, Job
from gpuctl_demo import GUIDANCE, IMAGE_GUIDANCE, STEPS, model_path
from gpuctl_demo.drawing import draw
from gpuctl_demo.scenes import ATTRIBUTES, Edit, edits
from gpuctl_demo.scorer import Scorer, right
from gpuctl_demo.sheet import Round, write_sheet

MODEL = "shapes-edit"
SEED = 11
REPEATS = 5
START_S = 120.0

CONFIG = """\
[daemon]
state_dir = "{home}/state"

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
    broadcast: float

    @property
    def saved(self) -> float:
        return self.serial - self.broadcast

    @property
    def ratio(self) -> float:
        return self.serial / self.broadcast


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 100)
    with tempfile.TemporaryDirectory(prefix="gpuctl-demo-") as home, _daemon(Path(home), console):
        client = Client(f"ipc://{home}/gpuctl.sock")
        timings = _load_and_compare(client, console)
        rounds = [_round(client, category, options.images, console) for category in ATTRIBUTES]
        size = client.status()["models"][0]["host_bytes"]
    _report(console, timings, rounds, size)
    console.print(f"Contact sheet: [bold]{write_sheet(options.out, rounds)}[/]")
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
    config = home / "config.toml"
    config.write_text(
        CONFIG.format(
            home=home,
            edit=model_path("shapes-edit"),
            steps=STEPS,
            guidance=GUIDANCE,
            image_guidance=IMAGE_GUIDANCE,
        )
    )
    console.print("Starting a private daemon ...")
    devices = "auto" if _has_gpu() else "cpu,cpu"
    command = [sys.executable, "-m", "gpuctld", "--config", str(config)]
    command += ["--socket", f"ipc://{home}/gpuctl.sock", "--devices", devices]
    with (home / "daemon.log").open("w") as log:
        process = subprocess.Popen(  # noqa: S603  our own program
            command, stderr=log, start_new_session=True
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
    runs = [_both_ways(client, gpus) for _ in range(REPEATS)]
    medians = [median(column) for column in zip(*runs, strict=True)]
    return [Timing("unload", medians[0], medians[2]), Timing("reload", medians[1], medians[3])]


def _both_ways(client: Client, gpus: list[int]) -> tuple[float, float, float, float]:
    """Seconds of unload and reload: one GPU after the other, then by broadcast."""
    return (
        sum(client.unload(MODEL, gpus=[gpu])["duration_s"] for gpu in gpus),
        client.reload(MODEL, parallel=False)["duration_s"],
        client.unload(MODEL)["duration_s"],
        client.reload(MODEL)["duration_s"],
    )


def _round(client: Client, category: str, count: int, console: Console) -> Round:
    """Edit one category on all workers, then score with the devices free."""
    asked = edits(category, count, SEED)
    started = time.perf_counter()
    images = _edit(client, asked)
    drawn = time.perf_counter()
    with client.unloaded():
        unloaded = time.perf_counter()
        seen = Scorer.load().judge(images)
        scored = time.perf_counter()
    reloaded = time.perf_counter()
    hits = sum(right(each, edit.after) for each, edit in zip(seen, asked, strict=True))
    console.print(
        f"  {category:<10}  {len(images)} edits in {drawn - started:5.2f} s   "
        f"unload {1000 * (unloaded - drawn):4.0f} ms   score {hits}/{count} right   "
        f"reload {1000 * (reloaded - scored):4.0f} ms"
    )
    moving = (unloaded - drawn, reloaded - scored)
    return Round(category, asked, images, hits, drawn - started, *moving)


def _edit(client: Client, asked: list[Edit]) -> list[Image.Image]:
    """All edits of a category, spread over the workers, back in the order of asking."""
    jobs = [
        Job(MODEL, {"prompt": edit.instruction}, {"image": draw(edit.before)}, SEED, name=str(k))
        for k, edit in enumerate(asked)
    ]
    images: dict[str, Image.Image] = {}
    for job, outcome in client.map(jobs):
        if isinstance(outcome, GpuctlError):
            raise outcome
        images[job.name] = outcome[0]
    return [images[job.name] for job in jobs]


# --- what it came to ------------------------------------------------------------------------


def _report(console: Console, timings: list[Timing], rounds: list[Round], size: int) -> None:
    console.print(_operations(timings))
    console.print(_loop(rounds))
    console.print(
        f"Broadcast has saved {_saved(timings, len(rounds))}; these\n"
        f"weights are {size / 1e6:.0f} MB. What 34 GB on each GPU take: docs/performance.md.\n"
    )


def _saved(timings: list[Timing], rounds: int) -> str:
    """What a broadcast gains needs a core for each device."""
    saved = sum(each.saved for each in timings)
    if saved <= 0:
        return "nothing on this machine, which is busy or has few cores"
    return f"{_ms(saved)} per category, {_ms(saved * rounds)} in all"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _operations(timings: list[Timing]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Serial and broadcast", title_justify="left")
    for name in ("operation", "serial", "broadcast", "saved", "ratio"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for each in timings:
        seconds = (each.serial, each.broadcast, each.saved)
        table.add_row(each.operation, *map(_ms, seconds), f"{each.ratio:.1f} x")
    return table


def _loop(rounds: list[Round]) -> Table:
    """Per category; the moves are those of a lease, with all that belongs to it."""
    table = Table(box=SIMPLE_HEAD, title="The loop", title_justify="left", show_footer=True)
    hits = f"{sum(each.right for each in rounds)}/{sum(len(each.edits) for each in rounds)}"
    table.add_column("category", footer="total")
    table.add_column("edits right", hits, justify="right")
    table.add_column("editing", f"{sum(each.draw_s for each in rounds):.2f} s", justify="right")
    table.add_column("unload", _ms(sum(each.unload_s for each in rounds)), justify="right")
    table.add_column("reload", _ms(sum(each.reload_s for each in rounds)), justify="right")
    for each in rounds:
        right_ones = f"{each.right}/{len(each.edits)}"
        moves = (_ms(each.unload_s), _ms(each.reload_s))
        table.add_row(each.category, right_ones, f"{each.draw_s:.2f} s", *moves)
    return table


if __name__ == "__main__":
    sys.exit(main())
