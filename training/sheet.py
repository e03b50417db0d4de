"""The sheet of samples: what was asked for stands under what came out."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gpuctl_demo.drawing import SIDE, draw
from gpuctl_demo.scenes import ATTRIBUTES, Edit, edits, prompts
from training.evaluate import Evaluation

SEED = 3
COLUMNS = 6
ZOOM = 2
TILE = ZOOM * SIDE
GAP = 14
TEXT_HEIGHT = 38
LINE = 28
EDITS_PER_CATEGORY = 3

Cell = tuple[list[Image.Image], str]


def write(path: Path, evaluation: Evaluation) -> int:
    """Draws the sheet of held-out prompts and edits; returns the number of samples on it."""
    asked = [prompt.text for prompt in prompts(3 * COLUMNS, SEED)]
    pictures = evaluation.generate(asked, SEED)
    changes = [edit for name in ATTRIBUTES for edit in edits(name, EDITS_PER_CATEGORY, SEED)]
    changed = evaluation.edit(changes, SEED)
    cells: list[Cell] = [([image], text) for image, text in zip(pictures, asked, strict=True)]
    pairs = [_edit_cell(edit, image) for edit, image in zip(changes, changed, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    _stack([_grid(cells, COLUMNS), _grid(pairs, EDITS_PER_CATEGORY)]).save(path, optimize=True)
    return len(cells) + len(pairs)


def _edit_cell(edit: Edit, image: Image.Image) -> Cell:
    return [draw(edit.before), image], edit.instruction


def _grid(cells: list[Cell], columns: int) -> Image.Image:
    """Cells of one or two images, each above its text."""
    width = len(cells[0][0]) * (TILE + GAP)
    height = TILE + TEXT_HEIGHT + GAP
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "#dddddd")
    for number, (images, text) in enumerate(cells):
        _place(sheet, images, text, number % columns * width, number // columns * height)
    return sheet


def _place(sheet: Image.Image, images: list[Image.Image], text: str, x: int, y: int) -> None:
    for number, image in enumerate(images):
        large = image.resize((TILE, TILE), Image.Resampling.NEAREST)
        sheet.paste(large, (x + GAP // 2 + number * (TILE + GAP), y + GAP // 2))
    pen = ImageDraw.Draw(sheet)
    lines = _wrap(text, LINE * len(images))
    font = ImageFont.load_default(10)
    pen.text((x + GAP // 2, y + TILE + GAP // 2 + 2), lines, "black", font, spacing=1)


def _wrap(text: str, width: int) -> str:
    """The words on lines of at most `width` letters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _stack(parts: list[Image.Image]) -> Image.Image:
    width = max(part.width for part in parts)
    whole = Image.new("RGB", (width, sum(part.height for part in parts)), "#dddddd")
    y = 0
    for part in parts:
        whole.paste(part, (0, y))
        y += part.height
    return whole
