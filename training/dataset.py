"""What the denoisers learn from, all of it in the accelerator's memory before they start."""

import itertools
import random
from collections.abc import Iterator

import attrs
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from gpuctl_demo.drawing import Jitter, render
from gpuctl_demo.scenes import (
    ATTRIBUTES,
    Scene,
    caption,
    edited,
    instruction,
    is_held_out,
    possible_values,
    training_scenes,
)
from training.config import Config

ENCODE_BATCH = 1024


@attrs.frozen
class Pictures:
    """Latents [scenes, variants, channels, h, w], captions [scenes, captions, tokens]."""

    latents: Tensor
    captions: Tensor


@attrs.frozen
class Edits:
    """Edits in order of category: scene indices [edits], instructions [edits, tokens].

    `starts` and `counts` [categories] say where each category lies.
    """

    before: Tensor
    after: Tensor
    instructions: Tensor
    starts: Tensor
    counts: Tensor


def pictures(
    config: Config, vae: AutoencoderKL, tokenizer: CLIPTokenizer, device: torch.device
) -> Pictures:
    """Every training scene drawn, encoded and described."""
    scenes = training_scenes()
    rng = random.Random(config.seed)
    texts = [caption(scene, rng).text for scene in scenes for _ in range(config.captions)]
    tokens = tokenize(tokenizer, texts, device)
    return Pictures(
        _latents(scenes, config, vae, device), tokens.view(len(scenes), config.captions, -1)
    )


def edits(config: Config, tokenizer: CLIPTokenizer, device: torch.device) -> Edits:
    """Every possible edit between two training scenes, asked for in a few ways."""
    scenes = training_scenes()
    index = {scene: number for number, scene in enumerate(scenes)}
    rng = random.Random(config.seed)
    rows: list[tuple[int, int, str]] = []
    counts: list[int] = []
    for category in ATTRIBUTES:
        found = [
            (index[before], index[edited(before, category, value)], text)
            for before, value in _changes(scenes, category)
            for text in _orders(before, category, value, config.instructions, rng)
        ]
        rows += found
        counts.append(len(found))
    starts = [0, *itertools.accumulate(counts)][:-1]
    before, after, texts = zip(*rows, strict=True)
    return Edits(
        torch.tensor(before, device=device),
        torch.tensor(after, device=device),
        tokenize(tokenizer, list(texts), device),
        torch.tensor(starts, device=device),
        torch.tensor(counts, device=device),
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], device: torch.device) -> Tensor:
    """Token numbers [texts, longest], padded as the pipelines pad."""
    found = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return found.input_ids.to(device)


def _changes(scenes: list[Scene], category: str) -> Iterator[tuple[Scene, str]]:
    for before in scenes:
        for value in possible_values(before, category):
            if not is_held_out(edited(before, category, value)):
                yield before, value


def _orders(before: Scene, category: str, value: str, n: int, rng: random.Random) -> list[str]:
    return [instruction(before, category, value, rng) for _ in range(n)]


@torch.no_grad()
def _latents(
    scenes: list[Scene], config: Config, vae: AutoencoderKL, device: torch.device
) -> Tensor:
    """Variant k has the same jitter in every scene, so that an edit changes one thing only."""
    generator = torch.Generator(device).manual_seed(config.seed)
    n = config.variants
    jitter = Jitter.random(n, generator)
    encoded = []
    for start in range(0, len(scenes), ENCODE_BATCH):
        part = scenes[start : start + ENCODE_BATCH]
        encoded.append(torch.stack([_encode(vae, part, jitter.pick(k)) for k in range(n)], dim=1))
    return torch.cat(encoded)


def _encode(vae: AutoencoderKL, scenes: list[Scene], jitter: Jitter) -> Tensor:
    """All scenes with one and the same jitter."""
    images = render(scenes, jitter, jitter.scale.device)
    return vae.encode(images * 2 - 1).latent_dist.mode()
