"""Writes what benchmarks/weights.py has found: a table, and a plot."""

from __future__ import annotations

import importlib.util
import math
import statistics
from pathlib import Path
from typing import Any

Found = dict[str, list[Any]]

NOT_MEASURED = "not measured"


def write(results: dict[str, Any], folder: Path, table: Path | None) -> None:
    """Print the table, write it to ``table``, and draw ``weights.png``."""
    text = markdown(results)
    print(text)
    if table is not None:
        table.write_text(text)
    if importlib.util.find_spec("matplotlib") is not None:
        _plot(results["found"], folder / "weights.png")


def markdown(results: dict[str, Any]) -> str:
    """The page docs/performance.md."""
    about, found = results["about"], results["found"]
    rows = [*_main_rows(found, about["gpus"]), *_neighbour_rows(found)]
    lines = [
        "# Performance",
        "",
        "Written by `benchmarks/weights.py`; no figure here was typed by hand.",
        "",
        f"- Date: {about['date']}",
        f"- Host: {about['host']}",
        f"- Command: `{about['command']}`",
        f"- Model: FLUX-sized pipeline of random bfloat16 weights, {about['bytes'] / 1e9:.1f} GB",
        "- Seconds run from the command to the last worker's answer. GB = 1e9 bytes.",
        "",
        "## Targets",
        "",
        "| what | target | measured | reached |",
        "|---|---|---|---|",
        *[f"| {what} | {target} | {value} | {reached} |" for what, target, value, reached in rows],
        "",
        "## Every arm",
        "",
        "| what | n | median s | p95 s |",
        "|---|---|---|---|",
        *[_arm_row(name, samples) for name, samples in found.items() if _has_seconds(samples)],
        "",
    ]
    return "\n".join(lines)


def _has_seconds(samples: list[Any]) -> bool:
    return isinstance(samples[0], dict) and "seconds" in samples[0]


def _arm_row(name: str, samples: list[Any]) -> str:
    values = _seconds(samples)
    row = f"| {name} | {len(values)} | {statistics.median(values):.4f} | {p95(values):.4f} |"
    refused = {each["error"] for each in samples if each.get("error")}
    return f"{row} {'; '.join(refused)}" if refused else row


def _seconds(samples: list[Any]) -> list[float]:
    return [each["seconds"] for each in samples]


def p95(values: list[float]) -> float:
    return percentile(values, 0.95)


def percentile(values: list[float], share: float) -> float:
    """The value that ``share`` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def _median(found: Found, name: str) -> float:
    return statistics.median(_seconds(found[name]))


Row = tuple[str, str, str, str]


def _main_rows(found: Found, gpus: int) -> list[Row]:
    floor = _median(found, "floor")
    unload, alone = _median(found, "ours_unload"), _median(found, "ours_alone_reload")
    first, warm = _median(found, "first_forward"), _median(found, "second_forward")
    verified = _median(found, "verified_reload")
    host = found["host"][0]
    return [
        _most("unload to driver-confirmed free", unload * 1e3, 80, "ms"),
        _ratio("unload against .to() in threads", found, "unload", 150),
        _most("reload against the pinned floor, no fan-out", alone / floor, 1.15, "x"),
        _fanout_row(found, floor, gpus),
        _ratio("reload against .to() in threads", found, "reload", 7),
        _most("verify adds to a reload", (verified / alone - 1) * 100, 10, "%"),
        _most("first step after a reload against the next", first / warm, 1.1, "x"),
        _equal_row(found),
        _left_row(found),
        _most("left after suspend", found["left_after_suspend"][-1]["used"] / 2**20, 16, "MiB"),
        _most("suspend", _median(found, "suspend"), 0.8, "s"),
        _most("wake", _median(found, "wake"), 0.8, "s"),
        _most("host memory against the model", host["file"] / host["model"], 1.03, "x"),
    ]


def _most(what: str, value: float, limit: float, unit: str) -> Row:
    return what, f"<= {limit:g} {unit}", f"{value:.3g} {unit}", _yes(value <= limit)


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


def _ratio(what: str, found: Found, verb: str, least: float) -> Row:
    ratio = _median(found, f"module_threads_{verb}") / _median(found, f"ours_{verb}")
    return what, f">= {least:g} x", f"{ratio:.1f} x", _yes(ratio >= least)


def _fanout_row(found: Found, floor: float, gpus: int) -> Row:
    what = "reload against the pinned floor, fan-out"
    if gpus == 1:
        return what, "<= 0.6 x", NOT_MEASURED, "-"
    return _most(what, _median(found, "ours_reload") / floor, 0.6, "x")


def _equal_row(found: Found) -> Row:
    samples = found["first_forward"]
    equal = all(answer["equal"] for sample in samples for answer in sample["answers"])
    return "outputs after a reload", "bit-equal", "bit-equal" if equal else "differ", _yes(equal)


def _left_row(found: Found) -> Row:
    last = found["left_after_unload"][-1]
    text = f"{last['used'] / 2**20:.0f} MiB; {last['context'] / 2**20:.0f} MiB before any model"
    return "left after unload", "context only", text, "-"


def _neighbour_rows(found: Found) -> list[Row]:
    if "neighbour_idle" not in found:
        return [("neighbour's p99 step while a GPU pins, cycles", "<= 1.1 x", NOT_MEASURED, "-")]
    idle = percentile(found["neighbour_idle"][0], 0.99)
    return [
        _most(f"neighbour's p99 step, {what}", percentile(values[0], 0.99) / idle, 1.1, "x")
        for what, values in found.items()
        if what in {"neighbour_pins", "neighbour_cycles"}
    ]


ARMS = {
    "ours": "gpuctl",
    "module_threads": ".to() in threads",
    "module_processes": ".to() in processes",
    "saver": "torch_memory_saver",
    "checkpoint": "driver checkpoint",
}


def _plot(found: Found, path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415  optional

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = [name for name in ARMS if f"{name}_unload" in found]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
    for axis, verb in zip(axes, ("unload", "reload"), strict=True):
        values = [_median(found, f"{name}_{verb}") for name in names]
        bars = axis.barh([ARMS[name] for name in names], values)
        axis.bar_label(bars, [f"{value:.3g} s" for value in values], padding=3)
        axis.set(xscale="log", title=verb, xlabel="seconds (median)")
        axis.margins(x=0.2)
        axis.invert_yaxis() if verb == "unload" else None
    figure.savefig(path, dpi=120)
