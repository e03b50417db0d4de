"""A benchmark that edits with a diffusion model and scores with another program on the same GPUs.

    python examples/benchmark_loop.py shapes-edit --rounds 3

With the demo's model and scorer; put your own in their place.
"""

from __future__ import annotations

import argparse
import time

from gpuctl import Client, GpuctlError, Job
from gpuctl_demo import scenes
from gpuctl_demo.drawing import draw
from gpuctl_demo.scorer import Scorer, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=len(scenes.ATTRIBUTES))
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()
    with Client() as client:
        client.load(options.model, serial=True)
        for category in scenes.ATTRIBUTES[: options.rounds]:
            run_category(client, options.model, category, options.images)


def run_category(client: Client, model: str, category: str, count: int) -> None:
    """Edit on all GPUs, then score with the GPUs free; the model is back afterwards."""
    edits = scenes.edits(category, count, seed=1)
    images = edit(client, model, edits)
    started = time.perf_counter()
    with client.unloaded():
        seen = Scorer.load().judge(images)
    away = time.perf_counter() - started
    hits = sum(right(scene, each.after) for scene, each in zip(seen, edits, strict=True))
    print(f"{category}: {hits} of {count} right, {away:.2f} s without the model")


def edit(client: Client, model: str, edits: list[scenes.Edit]) -> list:
    """All edits, on whichever GPU is free; in their own order again."""
    jobs = [
        Job(model, {"prompt": each.instruction}, {"image": draw(each.before)}, seed=1, name=str(k))
        for k, each in enumerate(edits)
    ]
    images = {}
    for job, outcome in client.map(jobs):
        if isinstance(outcome, GpuctlError):
            raise outcome
        images[job.name] = outcome[0]
    return [images[job.name] for job in jobs]


if __name__ == "__main__":
    main()
