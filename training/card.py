"""Writes the figures of the model card from what the last run recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS = ("results.json", "stages.json")
START, END = "<!-- figures -->\n", "<!-- end of figures -->"


def write(work: Path, card: Path = HERE / "README.md") -> int:
    """Keep the records of ``work`` beside the card and fill in its part between the markers.

    Returns the number of lines filled in.
    """
    for name in RECORDS:
        shutil.copyfile(work / name, card.parent / name)
    figures, stages = (json.loads((card.parent / name).read_text()) for name in RECORDS)
    before, rest = card.read_text().split(START)
    _, after = rest.split(END)
    lines = [*_quality(figures), "", *_effort(stages)]
    card.write_text(before + START + "\n".join(lines) + "\n" + END + after)
    return len(lines)


def _quality(figures: dict[str, Any]) -> list[str]:
    drawn, settings = figures["text_to_image"], figures["settings"]
    rows = [("text to image: shape, colour and background", drawn["n"], drawn["right"])]
    rows += [
        (f"edit: {name} changed, the rest as it was", each["n"], each["right"])
        for name, each in figures["edits"].items()
    ]
    rows.append(
        ("scorer, on unseen drawings", figures["scorer"]["n"], figures["scorer"]["right_in_all"])
    )
    head = (
        f"{settings['steps']} steps, guidance {settings['guidance']}, image guidance "
        f"{settings['image_guidance']}, seed {figures['seed']}, torch "
        f"{figures['environment']['torch']} on {figures['environment']['device']}:"
    )
    table = [f"| {what} | {n} | {100 * right:.1f} % |" for what, n, right in rows]
    return [head, "", "| | tried | right |", "|---|---|---|", *table]


def _effort(stages: dict[str, Any]) -> list[str]:
    table = [
        f"| {name} | {amount} | {s:.0f} s | {where} |"
        for name, (amount, s, where) in stages.items()
    ]
    return [
        "| last run of the stage | steps, bytes or images | time | on |",
        "|---|---|---|---|",
        *table,
    ]
