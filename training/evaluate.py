"""Measures the shipped files: `python -m training.evaluate` writes training/results.json.

The pipelines are loaded as anyone would load them, by `DiffusionPipeline.from_pretrained`.
"""

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import click
import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image

from gpuctl_demo import GUIDANCE, IMAGE_GUIDANCE, MODELS, STEPS
from gpuctl_demo.drawing import Jitter, draw, from_images, render
from gpuctl_demo.scenes import (
    ATTRIBUTES,
    MAIN_ATTRIBUTES,
    Edit,
    Prompt,
    Scene,
    all_scenes,
    edits,
    prompts,
)
from gpuctl_demo.scorer import Scorer, right
from training.config import EVALUATION_BATCH, EVALUATION_SEED, FULL

RESULTS = Path(__file__).parent / "results.json"
DRAWINGS_SEED = 99

Figures = dict[str, object]
Verdict = tuple[Scene, Scene]
"""What the scorer saw, and what was wanted."""


@attrs.frozen
class Settings:
    """How the pipelines are called."""

    steps: int = STEPS
    guidance: float = GUIDANCE
    image_guidance: float = IMAGE_GUIDANCE


@attrs.frozen
class Evaluation:
    """The pipelines, the scorer, and the settings that they are measured at."""

    text_to_image: DiffusionPipeline
    editor: DiffusionPipeline
    scorer: Scorer
    device: torch.device
    settings: Settings = Settings()

    @classmethod
    def load(cls, models: Path, device: torch.device) -> "Evaluation":
        """Everything from the folders that ship."""
        pipelines = [
            DiffusionPipeline.from_pretrained(models / name).to(device)
            for name in ("shapes", "shapes-edit")
        ]
        for pipeline in pipelines:
            pipeline.set_progress_bar_config(disable=True)
        scorer = Scorer.load(models / "scorer.safetensors", device)
        return cls(*pipelines, scorer, device)

    def generate(self, wanted: Sequence[str], seed: int) -> list[Image.Image]:
        """One image per prompt."""
        return self._batches(self._generate, wanted, seed)

    def edit(self, wanted: Sequence[Edit], seed: int) -> list[Image.Image]:
        """The drawing of each edit's scene, edited."""
        return self._batches(self._edit, wanted, seed)

    def figures(self, n_prompts: int, n_edits: int, seed: int) -> Figures:
        """All that the model card states."""
        return {
            "seed": seed,
            "settings": attrs.asdict(self.settings),
            "text_to_image": self.judge_prompts(prompts(n_prompts, seed), seed),
            "edits": {
                category: self.judge_edits(edits(category, n_edits, seed), category, seed)
                for category in ATTRIBUTES
            },
            "scorer": self.judge_drawings(),
            "environment": _environment(self.device),
        }

    def judge_prompts(self, wanted: list[Prompt], seed: int) -> Figures:
        """Shares right: in the attributes always stated, in all stated ones, and one by one."""
        seen = self.scorer.judge(self.generate([prompt.text for prompt in wanted], seed))
        pairs = list(zip(seen, wanted, strict=True))
        stated = {
            name: [right(saw, want.scene, [name]) for saw, want in pairs if name in want.states]
            for name in ATTRIBUTES
        }
        verdicts = [(saw, want.scene) for saw, want in pairs]
        return {
            "n": len(wanted),
            "right": share(right(*verdict, MAIN_ATTRIBUTES) for verdict in verdicts),
            "right_in_all_stated": share(right(saw, w.scene, w.states) for saw, w in pairs),
            "by_attribute": {name: share(marks) for name, marks in stated.items()},
            "wrong": _mistakes(verdicts, MAIN_ATTRIBUTES),
        }

    def judge_edits(self, wanted: list[Edit], category: str, seed: int) -> Figures:
        """Shares right: in everything, in the attribute to change, and in the four others."""
        seen = self.scorer.judge(self.edit(wanted, seed))
        verdicts = [(saw, edit.after) for saw, edit in zip(seen, wanted, strict=True)]
        others = [name for name in ATTRIBUTES if name != category]
        return {
            "n": len(wanted),
            "right": share(right(*verdict) for verdict in verdicts),
            "changed": share(right(*verdict, [category]) for verdict in verdicts),
            "others_unchanged": share(right(*verdict, others) for verdict in verdicts),
            "wrong": _mistakes(verdicts, ATTRIBUTES),
        }

    def judge_drawings(self) -> Figures:
        """The scorer on every scene, drawn with deviations that it has not seen."""
        scenes = list(all_scenes())
        generator = torch.Generator().manual_seed(DRAWINGS_SEED)
        images = render(scenes, Jitter.random(len(scenes), generator))
        verdicts = list(zip(self.scorer.judge_tensor(images), scenes, strict=True))
        return {
            "n": len(scenes),
            "right_in_all": share(right(*verdict) for verdict in verdicts),
            "wrong": _mistakes(verdicts, ATTRIBUTES),
        }

    def _generate(self, wanted: Sequence[str], generator: torch.Generator) -> list[Image.Image]:
        return self.text_to_image(
            list(wanted),
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance,
            generator=generator,
        ).images

    def _edit(self, wanted: Sequence[Edit], generator: torch.Generator) -> list[Image.Image]:
        return self.editor(
            [edit.instruction for edit in wanted],
            image=from_images([draw(edit.before) for edit in wanted]),
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance,
            image_guidance_scale=self.settings.image_guidance,
            generator=generator,
        ).images

    def _batches(
        self,
        run: Callable[[Sequence[Any], torch.Generator], list[Image.Image]],
        wanted: Sequence[Any],
        seed: int,
    ) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(seed)
        images: list[Image.Image] = []
        for start in range(0, len(wanted), EVALUATION_BATCH):
            images += run(wanted[start : start + EVALUATION_BATCH], generator)
        return images


def share(marks: Iterable[bool]) -> float:
    """The share of true ones, to four decimals."""
    listed = list(marks)
    return round(sum(listed) / len(listed), 4) if listed else 0.0


def _mistakes(verdicts: Iterable[Verdict], attributes: Iterable[str]) -> dict[str, int]:
    """How often one value was taken for another, the most frequent first."""
    names = list(attributes)
    found = Counter(
        f"{name} {getattr(wanted, name)} -> {getattr(saw, name)}"
        for saw, wanted in verdicts
        for name in names
        if not right(saw, wanted, [name])
    )
    return dict(found.most_common(10))


def _environment(device: torch.device) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


@click.command()
@click.option("--prompts", "n_prompts", default=FULL.prompts, show_default=True)
@click.option("--edits", "n_edits", default=FULL.edits, show_default=True, help="Per category.")
@click.option("--seed", default=EVALUATION_SEED, show_default=True)
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--guidance", default=GUIDANCE, show_default=True)
@click.option("--image-guidance", default=IMAGE_GUIDANCE, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--models", type=click.Path(path_type=Path), default=MODELS)
@click.option("--write/--no-write", default=True, help=f"Write {RESULTS.name}.")
def main(
    n_prompts: int,
    n_edits: int,
    seed: int,
    steps: int,
    guidance: float,
    image_guidance: float,
    device: str,
    models: Path,
    write: bool,
) -> None:
    """Print the figures of the shipped model, and write them down."""
    evaluation = Evaluation.load(models, torch.device(device))
    evaluation = attrs.evolve(evaluation, settings=Settings(steps, guidance, image_guidance))
    text = json.dumps(evaluation.figures(n_prompts, n_edits, seed), indent=2)
    print(text)
    if write:
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
