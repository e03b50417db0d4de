"""The program that takes turns with the diffusion model: it reads a scene off an image.

A small convolutional classifier with one head per attribute of a scene. It was trained on
drawings alone, never on images of the diffusion model that it judges.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_model
from torch import Tensor, nn

from gpuctl_demo import model_path
from gpuctl_demo.drawing import SIDE, from_images
from gpuctl_demo.scenes import ATTRIBUTES, VALUES, Scene

CHANNELS = (3, 24, 48, 64, 64)
HEADS = tuple(len(values) for values in VALUES.values())


class ScorerNet(nn.Module):
    """Images [n, 3, SIDE, SIDE] in 0..1 to one row of logits per attribute."""

    def __init__(self) -> None:
        super().__init__()
        pairs = itertools.pairwise(CHANNELS)
        self.body = nn.Sequential(*(_halve(before, after) for before, after in pairs), nn.Flatten())
        cells = (SIDE // 2 ** (len(CHANNELS) - 1)) ** 2
        self.heads = nn.Linear(CHANNELS[-1] * cells, sum(HEADS))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits: Tensor = self.heads(self.body(images * 2 - 1))
        return torch.split(logits, list(HEADS), dim=1)


class Scorer:
    """Judges images; the same weights on any device."""

    def __init__(self, net: ScorerNet, device: torch.device | str = "cpu") -> None:
        self.net = net.to(device).eval()
        self.device = device

    @classmethod
    def load(cls, path: Path | None = None, device: torch.device | str = "cpu") -> "Scorer":
        """The shipped scorer, or the one in the safetensors file `path`.

        Raises:
            FileNotFoundError: there is no such file.
        """
        net = ScorerNet()
        load_model(net, path or model_path("scorer"))
        return cls(net, device)

    def judge(self, images: Sequence[Image.Image]) -> list[Scene]:
        """What each image shows, by the likeliest value of every attribute."""
        return self.judge_tensor(from_images(images))

    @torch.inference_mode()
    def judge_tensor(self, batch: Tensor) -> list[Scene]:
        """The same for a tensor [n, 3, SIDE, SIDE] in 0..1."""
        logits = self.net(batch.to(self.device))
        choices = torch.stack([each.argmax(1) for each in logits], dim=1)
        return [_scene(row) for row in choices.tolist()]


def right(seen: Scene, wanted: Scene, attributes: Iterable[str] = ATTRIBUTES) -> bool:
    """True if the two scenes agree in each of the attributes."""
    return all(getattr(seen, name) == getattr(wanted, name) for name in attributes)


def _scene(choices: Sequence[int]) -> Scene:
    values = zip(VALUES.values(), choices, strict=True)
    return Scene(*(names[choice] for names, choice in values))


def _halve(before: int, after: int) -> nn.Sequential:
    """Half the side, more channels."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()
    )
