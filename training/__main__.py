"""`python -m training`: from nothing to the shipped folders and their figures."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import click
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file, save_model

from gpuctl_demo import MODELS
from training import card, dataset, denoisers, evaluate, package, scoring, sheet, tokens, vae
from training.config import EVALUATION_SEED, PRESETS, Config

HERE = Path(__file__).parent


@attrs.frozen
class Run:
    """One training run: its numbers, where it computes, and where its files go."""

    config: Config
    device: torch.device
    work: Path
    models: Path
    sheet: Path

    def train_vae(self) -> int:
        """Stage 1."""
        model, steps = vae.train(self.config, self.device)
        model.save_pretrained(self.work / "vae")
        return steps

    def train_denoisers(self) -> int:
        """Stage 2, from where an earlier run left the networks, if one did."""
        tokenizer = tokens.build(self.work / "tokenizer")
        autoencoder = self._vae().to(self.device)
        nets = self._denoisers(fresh=True)
        pictures = dataset.pictures(self.config, autoencoder, tokenizer, self.device)
        edits = dataset.edits(self.config, tokenizer, self.device)
        print(f"{pictures.latents.shape} latents, {len(edits.before)} edits", flush=True)
        steps = denoisers.train(self.config, nets, pictures, edits, tokenizer)
        for name, net in self._named(nets):
            weights = {key: value.contiguous() for key, value in net.state_dict().items()}
            save_file(weights, self.work / f"{name}.safetensors")
        return steps

    def train_scorer(self) -> int:
        """Stage 3."""
        net, steps = scoring.train(self.config, self.device)
        self.models.mkdir(parents=True, exist_ok=True)
        save_model(net, str(self.models / "scorer.safetensors"))
        return steps

    def write_package(self) -> int:
        """Stage 4."""
        tokenizer = tokens.build(self.work / "tokenizer")
        package.save(self.models, self._vae(), self._denoisers(fresh=False), tokenizer)
        return sum(path.stat().st_size for path in self.models.rglob("*") if path.is_file())

    def evaluate(self) -> int:
        """Stage 5, on the packaged files alone."""
        judge = evaluate.Evaluation.load(self.models, self.device)
        figures = judge.figures(self.config.prompts, self.config.edits, EVALUATION_SEED)
        self._record("results.json", figures)
        print(json.dumps(figures, indent=2), flush=True)
        return self.config.prompts

    def draw_sheet(self) -> int:
        """Stage 6."""
        return sheet.write(self.sheet, evaluate.Evaluation.load(self.models, self.device))

    def write_card(self) -> int:
        """Stage 7."""
        return card.write(self.work)

    def _record(self, name: str, document: dict[str, object]) -> None:
        (self.work / name).write_text(json.dumps(document, indent=2) + "\n")

    def _vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self.work / "vae")

    def _denoisers(self, *, fresh: bool) -> denoisers.Denoisers:
        tokenizer = tokens.build(self.work / "tokenizer")
        nets = denoisers.new(self.config, tokenizer)
        for name, net in self._named(nets):
            path = self.work / f"{name}.safetensors"
            if path.exists() or not fresh:
                net.load_state_dict(load_file(path))
        return nets

    @staticmethod
    def _named(nets: denoisers.Denoisers) -> list[tuple[str, torch.nn.Module]]:
        names = ("text_encoder", "text_to_image", "edit")
        return list(zip(names, nets.modules, strict=True))

    def do(self, stage: str) -> None:
        """Runs one stage; records what it returned and how long it took."""
        started = time.monotonic()
        amount = STAGES[stage](self)
        seconds = round(time.monotonic() - started, 1)
        print(f"== {stage}: {amount} in {seconds} s", flush=True)
        log = self.work / "stages.json"
        done = json.loads(log.read_text()) if log.exists() else {}
        where = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self._record("stages.json", {**done, stage: [amount, seconds, where]})


STAGES: dict[str, Callable[[Run], int]] = {
    "vae": Run.train_vae,
    "denoisers": Run.train_denoisers,
    "scorer": Run.train_scorer,
    "package": Run.write_package,
    "evaluate": Run.evaluate,
    "sheet": Run.draw_sheet,
    "card": Run.write_card,
}


@click.command()
@click.argument("stages", nargs=-1, type=click.Choice(list(STAGES)))
@click.option("--preset", type=click.Choice(list(PRESETS)), default="full", show_default=True)
@click.option("--seconds", type=float, help="Time limit of the stage `denoisers`.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--work", type=click.Path(path_type=Path), default=HERE / "work", show_default=True)
@click.option("--models", type=click.Path(path_type=Path), default=MODELS, show_default=True)
@click.option(
    "--sheet",
    "sheet_path",
    type=click.Path(path_type=Path),
    default=HERE.parent / "docs" / "images" / "shapes-samples.png",
)
def main(
    stages: tuple[str, ...],
    preset: str,
    seconds: float | None,
    device: str,
    work: Path,
    models: Path,
    sheet_path: Path,
) -> None:
    """Run the STAGES named, or all of them in order."""
    torch.set_float32_matmul_precision("high")
    config = PRESETS[preset]
    if seconds is not None:
        config = attrs.evolve(config, denoisers=attrs.evolve(config.denoisers, seconds=seconds))
    work.mkdir(parents=True, exist_ok=True)
    run = Run(config, torch.device(device), work, models, sheet_path)
    for stage in stages or STAGES:
        run.do(stage)


main()
