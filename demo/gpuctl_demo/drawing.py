"""Draws scenes: antialiased shapes on a flat background, many at once, on any device.

A shape is a signed distance field in units of pixels (negative inside), after the well-known
formulas for 2D primitives; coverage falls from 1 to 0 over the pixel that the edge crosses.
"""

import math
from collections.abc import Sequence

import attrs
import torch
from PIL import Image
from torch import Tensor

from gpuctl_demo.scenes import COLOURS, SHAPES, Scene

SIDE = 64
"""Width and height of every drawing in pixels."""

RADII = {"small": 9.0, "medium": 13.5, "large": 18.5}
OFFSET = 13.0
CENTRES = {
    "middle": (0.0, 0.0),
    "left": (-OFFSET, 0.0),
    "right": (OFFSET, 0.0),
    "top": (0.0, -OFFSET),
    "bottom": (0.0, OFFSET),
}
STAR_POINTS = 5
STAR_INNER = 0.45


@attrs.frozen
class Jitter:
    """Small deviations for `n` drawings: radius factor [n], centre in pixels [n, 2]."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def none(cls, n: int, device: torch.device | str = "cpu") -> "Jitter":
        """The drawing exactly as the words say."""
        return cls(torch.ones(n, device=device), torch.zeros(n, 2, device=device))

    @classmethod
    def random(cls, n: int, generator: torch.Generator) -> "Jitter":
        """Up to 6 % in size and 1.5 pixels in place: too little to change any word."""
        uniform = torch.rand(n, 3, generator=generator, device=generator.device) * 2 - 1
        return cls(1 + 0.06 * uniform[:, 0], 1.5 * uniform[:, 1:])

    def pick(self, number: int) -> "Jitter":
        """One of the deviations: a jitter for one drawing, or for many by broadcasting."""
        return Jitter(self.scale[number : number + 1], self.shift[number : number + 1])


def draw(scene: Scene) -> Image.Image:
    """One drawing as an RGB image of SIDE x SIDE pixels."""
    return to_images(render([scene]))[0]


def render(
    scenes: Sequence[Scene], jitter: Jitter | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Drawings as a float tensor [n, 3, SIDE, SIDE] in 0..1."""
    jitter = jitter or Jitter.none(len(scenes), device)
    kinds = torch.tensor([SHAPES.index(scene.shape) for scene in scenes], device=device)
    radii = torch.tensor([RADII[scene.size] for scene in scenes], device=device) * jitter.scale
    centres = torch.tensor([CENTRES[scene.place] for scene in scenes], device=device)
    inside = _coverage(kinds, radii, centres + jitter.shift)[:, None]
    front = _paint([scene.colour for scene in scenes], device)
    back = _paint([scene.background for scene in scenes], device)
    return back + inside * (front - back)


def to_images(batch: Tensor) -> list[Image.Image]:
    """Images from a tensor [n, 3, h, w] in 0..1."""
    pixels = (batch.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each) for each in pixels]


def from_images(images: Sequence[Image.Image]) -> Tensor:
    """A float tensor [n, 3, SIDE, SIDE] in 0..1 from images of any size and mode."""
    return torch.stack([_from_image(image) for image in images])


def _from_image(image: Image.Image) -> Tensor:
    small = image.convert("RGB").resize((SIDE, SIDE))
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(SIDE, SIDE, 3).permute(2, 0, 1).float() / 255


def _paint(names: Sequence[str], device: torch.device | str) -> Tensor:
    return torch.tensor([COLOURS[name] for name in names], device=device)[:, :, None, None] / 255


def _coverage(kinds: Tensor, radii: Tensor, centres: Tensor) -> Tensor:
    """How much of each pixel the shape covers: [n, SIDE, SIDE] in 0..1."""
    axis = torch.arange(SIDE, device=kinds.device) + 0.5 - SIDE / 2
    x = axis[None, None, :] - centres[:, 0, None, None]
    y = axis[None, :, None] - centres[:, 1, None, None]
    x, y = x.expand(-1, SIDE, -1), y.expand(-1, -1, SIDE)
    radius = radii[:, None, None]
    fields = torch.stack([field(x, y, radius) for field in _FIELDS])
    distance = fields[kinds, torch.arange(len(kinds), device=kinds.device)]
    return (0.5 - distance).clamp(0, 1)


def _circle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.hypot(x, y) - radius


def _square(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    half = radius * 0.86
    return torch.maximum(x.abs(), y.abs()) - half


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Equilateral, pointing up: the farthest of its three edges."""
    inner = radius * 0.55
    slope = x.abs() * math.cos(math.pi / 6) - y * math.sin(math.pi / 6)
    return torch.maximum(slope, y) - inner


def _star(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """The distance to the edge from tip to notch, after folding the plane into one sector."""
    sector = math.pi / STAR_POINTS
    angle = torch.remainder(torch.atan2(x, -y) + sector, 2 * sector) - sector
    across, along = torch.hypot(x, y) * angle.sin().abs(), torch.hypot(x, y) * angle.cos()
    notch_x, notch_y = STAR_INNER * math.sin(sector), STAR_INNER * math.cos(sector)
    length = math.hypot(notch_x, 1 - notch_y)
    return (across * (1 - notch_y) + (along - radius) * notch_x) / length


def _ring(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return (torch.hypot(x, y) - radius * 0.76).abs() - radius * 0.24


_FIELDS = (_circle, _square, _triangle, _star, _ring)
