"""The table and the plot of what benchmarks/weights.py has found, also of a run that was cut off.

Needs no GPU, and matplotlib for the plot alone::

    python benchmarks/weights_report.py results.json --out results --table docs/performance.md
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

Found = dict[str, list[Any]]

NOT_MEASURED = "not measured"


def write(results: Path, folder: Path, table: Path | None) -> None:
    """Print the table of a results.json, write it to ``table``, and draw ``weights.png``."""
    read = json.loads(results.read_text())
    text = markdown(read)
    print(text)
    if table is not None:
        table.write_text(text)
    if importlib.util.find_spec("matplotlib") is not None:
        _plot(read["found"], folder / "weights.png")


def markdown(results: dict[str, Any]) -> str:
    """The page docs/performance.md."""
    about, found = results["about"], results["found"]
    rows = [*_main_rows(found, about["gpus"]), *_neighbour_rows(found)]
    lines = [
        "# Performance",
        "",
        "The tables are written by `benchmarks/weights.py`; no figure in them was typed by hand.",
        "",
        f"- Date: {about['date']}",
        f"- Host: {about['host']}",
        f"- Command: `{about['command']}`",
        f"- Model: FLUX-sized pipeline of random bfloat16 weights, {about['bytes'] / 1e9:.1f} GB",
        "- Seconds run from the command to the last worker's answer. GB = 1e9 bytes.",
        *_shortcomings(results),
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
        *[f"| {name} | 0 | {NOT_MEASURED} | - |" for name in _missing(found)],
        "",
    ]
    return "\n".join(lines)


def _shortcomings(results: dict[str, Any]) -> list[str]:
    """What a reader must know about a run that did not go through."""
    failed = [f"- {arm} ended with: {why}" for arm, why in results["failed"].items()]
    if not results["complete"]:
        failed.append("- The run was cut off; this is what had been measured.")
    return failed


def _missing(found: Found) -> list[str]:
    moves = (f"{arm}_{verb}" for arm in ARMS for verb in ("unload", "reload"))
    return [move for move in moves if move not in found]


def _has_seconds(samples: list[Any]) -> bool:
    return isinstance(samples[0], dict) and "seconds" in samples[0]


def _arm_row(name: str, samples: list[Any]) -> str:
    values = _seconds(samples)
    return f"| {name} | {len(values)} | {statistics.median(values):.4f} | {p95(values):.4f} |"


def _seconds(samples: list[Any]) -> list[float]:
    return [each["seconds"] for each in samples]


def p95(values: list[float]) -> float:
    return percentile(values, 0.95)


def percentile(values: list[float], share: float) -> float:
    """The value that ``share`` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def _median(found: Found, name: str) -> float | None:
    """Seconds; ``None`` where there is no sample."""
    return statistics.median(_seconds(found[name])) if name in found else None


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


Row = tuple[str, str, str, str]


def _main_rows(found: Found, gpus: int) -> list[Row]:
    floor = _median(found, "floor")
    unload, alone = _median(found, "ours_unload"), _median(found, "ours_alone_reload")
    fanout = _median(found, "ours_reload") if gpus > 1 else None
    first, warm = _median(found, "first_forward"), _median(found, "second_forward")
    added = _ratio(_median(found, "verified_reload"), alone)
    return [
        _most("unload to driver-confirmed free", _times(unload, 1e3), 80, "ms"),
        _against_threads(found, "unload", 150),
        _most("reload against the pinned floor, no fan-out", _ratio(alone, floor), 1.15, "x"),
        _most("reload against the pinned floor, fan-out", _ratio(fanout, floor), 0.6, "x"),
        _against_threads(found, "reload", 7),
        _most("verify adds to a reload", None if added is None else (added - 1) * 100, 10, "%"),
        _most("first step after a reload against the next", _ratio(first, warm), 1.1, "x"),
        _equal_row(found),
        _left_row(found),
        _most("left after suspend", _times(_left_after_suspend(found), 2**-20), 16, "MiB"),
        _most("suspend", _median(found, "suspend"), 0.8, "s"),
        _most("wake", _median(found, "wake"), 0.8, "s"),
        _most("host memory against the model", _host_share(found), 1.03, "x"),
    ]


def _most(what: str, value: float | None, limit: float, unit: str) -> Row:
    target = f"<= {limit:g} {unit}"
    if value is None:
        return what, target, NOT_MEASURED, "-"
    return what, target, f"{value:.3g} {unit}", _yes(value <= limit)


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


def _against_threads(found: Found, verb: str, least: float) -> Row:
    ratio = _ratio(_median(found, f"module_threads_{verb}"), _median(found, f"ours_{verb}"))
    what, target = f"{verb} against .to() in threads", f">= {least:g} x"
    if ratio is None:
        return what, target, NOT_MEASURED, "-"
    return what, target, f"{ratio:.1f} x", _yes(ratio >= least)


def _equal_row(found: Found) -> Row:
    what, target = "outputs after a reload", "bit-equal"
    if "first_forward" not in found:
        return what, target, NOT_MEASURED, "-"
    answers = [answer for sample in found["first_forward"] for answer in sample["answers"]]
    equal = all(answer["equal"] for answer in answers)
    return what, target, "bit-equal" if equal else "differ", _yes(equal)


def _left_row(found: Found) -> Row:
    what, target = "left after unload", "context only"
    if "left_after_unload" not in found:
        return what, target, NOT_MEASURED, "-"
    last = found["left_after_unload"][-1]
    text = f"{last['used'] / 2**20:.0f} MiB; {last['context'] / 2**20:.0f} MiB before any model"
    return what, target, text, "-"


def _left_after_suspend(found: Found) -> float | None:
    return found["left_after_suspend"][-1]["used"] if "left_after_suspend" in found else None


def _host_share(found: Found) -> float | None:
    host = found["host"][0] if "host" in found else {}
    return _ratio(host.get("file"), host.get("model"))


def _neighbour_rows(found: Found) -> list[Row]:
    idle = _p99_step(found, "idle")
    return [
        _most(f"neighbour's p99 step, {what}", _ratio(_p99_step(found, what), idle), 1.1, "x")
        for what in ("pins", "cycles")
    ]


def _p99_step(found: Found, what: str) -> float | None:
    """Milliseconds of a step on the GPU beside, over all turns together."""
    name = f"neighbour_{what}"
    return percentile([*itertools.chain(*found[name])], 0.99) if name in found else None


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

    names = [arm for arm in ARMS if not {f"{arm}_unload", f"{arm}_reload"} & {*_missing(found)}]
    if not names:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
    for axis, verb in zip(axes, ("unload", "reload"), strict=True):
        seconds = [_seconds(found[f"{name}_{verb}"]) for name in names]
        values = [statistics.median(each) for each in seconds]
        above = [max(0.0, p95(each) - value) for each, value in zip(seconds, values, strict=True)]
        whiskers = [[0.0] * len(names), above]
        bars = axis.barh([ARMS[name] for name in names], values, xerr=whiskers)
        axis.bar_label(bars, [f"{value:.3g} s" for value in values], padding=3)
        axis.set(xscale="log", title=verb, xlabel="seconds (median and p95)")
        axis.margins(x=0.2)
        axis.invert_yaxis() if verb == "unload" else None
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.json of a run")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), help="for weights.png")
    parser.add_argument("--table", type=Path, help="write the table as Markdown")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.results, options.out, options.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
