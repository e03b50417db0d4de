"""How long one image takes on one CPU core at the demo's settings; target: under a second."""

from __future__ import annotations

import statistics
import time

import torch
from diffusers import DiffusionPipeline

from gpuctl_demo import GUIDANCE, IMAGE_GUIDANCE, STEPS, model_path
from gpuctl_demo.drawing import draw
from gpuctl_demo.scenes import edits, prompts

REPEATS = 9


def main() -> None:
    torch.set_num_threads(1)
    prompt = prompts(1, 1)[0].text
    edit = edits("colour", 1, 1)[0]
    image, order = draw(edit.before), edit.instruction
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    report("text to image", "shapes", lambda pipe: pipe(prompt, **call))
    call["image_guidance_scale"] = IMAGE_GUIDANCE
    report("edit", "shapes-edit", lambda pipe: pipe(order, image=image, **call))


def report(what, model, run):
    pipeline = DiffusionPipeline.from_pretrained(model_path(model))
    pipeline.set_progress_bar_config(disable=True)
    run(pipeline)
    seconds = [timed(run, pipeline) for _ in range(REPEATS)]
    print(f"{what}: median {statistics.median(seconds):.3f} s, worst {max(seconds):.3f} s")


def timed(run, pipeline):
    started = time.perf_counter()
    run(pipeline)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
