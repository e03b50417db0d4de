"""The contact sheet: every edit with what it started from, as one picture."""

from __future__ import annotations

from pathlib import Path

import attrs
from PIL import Image, ImageDraw

from gpuctl_demo.drawing import draw
from gpuctl_demo.scenes import Edit

SCALE = 2
GAP = 12
LABEL = 34
INK = (40, 40, 40)
PAPER = (250, 250, 250)


@attrs.frozen
class Round:
    """One category: its edits, the images that came out, how many are right, and seconds."""

    category: str
    edits: list[Edit]
    images: list[Image.Image]
    right: int
    draw_s: float
    unload_s: float
    reload_s: float


def write_sheet(folder: Path, rounds: list[Round]) -> Path:
    """Write every image, and the sheet of all of them; the sheet's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in rounds:
        for number, image in enumerate(each.images):
            image.save(folder / f"{each.category}-{number}.png")
    sheet = folder / "contact-sheet.png"
    _compose(rounds).save(sheet)
    return sheet


def _compose(rounds: list[Round]) -> Image.Image:
    side = rounds[0].images[0].width * SCALE
    cell = 2 * side + 3 * GAP
    width = GAP + cell * max(len(each.images) for each in rounds)
    height = GAP + (side + LABEL + GAP) * len(rounds)
    sheet = Image.new("RGB", (width, height), PAPER)
    for row, each in enumerate(rounds):
        for column, edit in enumerate(each.edits):
            corner = (GAP + column * cell, GAP + row * (side + LABEL + GAP))
            _paste(sheet, corner, edit, each.images[column], side)
    return sheet


def _paste(
    sheet: Image.Image, corner: tuple[int, int], edit: Edit, after: Image.Image, side: int
) -> None:
    left, top = corner
    size = (side, side)
    nearest = Image.Resampling.LANCZOS
    sheet.paste(draw(edit.before).resize(size, nearest), (left, top))
    sheet.paste(after.resize(size, nearest), (left + side + GAP // 2, top))
    pen = ImageDraw.Draw(sheet)
    pen.text((left, top + side + 6), edit.instruction, fill=INK, font_size=13)
