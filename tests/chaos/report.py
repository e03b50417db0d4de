"""What the attacks have shown, for a terminal and for docs/reliability.md."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.chaos.trial import quantile

Found = dict[str, Any]

HEADING = """# Reliability

What `make chaos` saw: a real daemon, two workers, and attacks on them. Workers are killed, stopped
and broken under eight clients that generate, ask for the status, load, unload and reload; the
daemon itself is stopped, killed and asked to leave under load; programs die with the GPUs on a
lease; and strangers send nonsense. Written by `python -m tests.chaos report`, which puts in what
was run and leaves the rest as it was; no figure here was typed by hand.

A trial fails if a request has no answer or two, a job runs twice, a worker or the models do not
come back, a seeded picture changes, a process, a file or descriptors are left behind, the daemon's
memory grows, or a figure is above its bound. No failure in N tries means fewer than 3 / N with 95 %
confidence.

A worker's way back runs from the end of its process: the silence before a stopped worker is ended
(10 s) comes on top. The status is that of a client that does nothing wrong, and must be there in
50 ms (p99); while the daemon itself is stopped it waits for as long. Answers to clients whose
daemon is killed are not counted: they end with its connection. What a cut, full or damaged state
file does is tried at every byte, each time the tests run (`tests/unit/test_state_file.py`).
"""

COLUMNS = (
    *("attack", "times", "failures", "below", "seconds, median / p99", "bound"),
    *("requests", "status p99", "memory"),
)


def save(found: Found, folder: Path) -> None:
    """Write a run's JSON file, from which the page can be made at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{found['scenario']}.json").write_text(json.dumps(found, indent=1))


def summary(found: Found) -> str:
    """A few lines about one run."""
    codes = ", ".join(f"{count} {code}" for code, count in sorted(found["codes"].items()))
    lines = [
        f"{found['count']} in {found['seconds']:.0f} s, {len(found['wrongs'])} failures",
        *[f"  WRONG: {wrong}" for wrong in found["wrongs"]],
        f"  {found['took'] or 'took'}: {_spread(found['took_s'])}",
        f"  {found['revived']} workers revived",
        f"  {found['requests']} requests: {codes}",
        f"  status after {_spread(found['status_s'])}",
        f"  memory {_growth(found)}",
    ]
    return "\n".join(lines) + "\n"


def updated(page: str, runs: Sequence[Found]) -> str:
    """docs/reliability.md with these runs in it; attacks not among them stay as they are."""
    rows = _named(_ROW, page) | {found["scenario"]: _row(found) for found in runs}
    about = _named(_ABOUT, page) | {found["scenario"]: _about(found) for found in runs}
    lines = [
        HEADING,
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *[rows[name] for name in about],
        "",
        "## The attacks",
        "",
        *about.values(),
        "",
    ]
    return "\n".join(lines)


_ROW = re.compile(r"^\| ([a-z-]+) \|.*$", re.MULTILINE)
_ABOUT = re.compile(r"^- \*\*([a-z-]+)\*\*: .*$", re.MULTILINE)


def _named(line: re.Pattern[str], page: str) -> dict[str, str]:
    return {match[1]: match[0] for match in line.finditer(page)}


def _row(found: Found) -> str:
    failures = len(found["wrongs"])
    below = f"{_short(300 / found['count'])} %" if not failures else "-"
    cells = [found["scenario"], f"{found['count']:,}", failures, below, *_took(found)]
    glance = f"{quantile(found['status_s'], 0.99) * 1e3:.0f} ms" if found["status_s"] else "-"
    cells += [found["requests"] or "-", glance, _growth(found)]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _short(number: float) -> str:
    """One digit that counts, and no exponent."""
    return f"{float(f'{number:.1g}'):f}".rstrip("0").rstrip(".")


def _took(found: Found) -> tuple[str, str]:
    """What the attack measured, and its bound."""
    seconds, bound = found["took_s"], found["bound_s"]
    if not seconds:
        return "-", "-"
    median, p99 = quantile(seconds, 0.5), quantile(seconds, 0.99)
    return f"{found['took']}: {median:.2f} / {p99:.2f}", "-" if bound is None else f"{bound:g} s"


def _about(found: Found) -> str:
    took = f"{found['seconds'] / 60:.0f} min"
    about = f"`{found['command']}`; {found['date']}, {found['host']}, {took}."
    return f"- **{found['scenario']}**: {found['what']} {about}"


def _growth(found: Found) -> str:
    growth = found["growth_mib_per_h"]
    if growth is not None:
        return f"{growth:+.1f} MiB/h"
    sizes = found["memory_mib"]
    return f"{sizes[0]:.0f} -> {sizes[-1]:.0f} MiB" if sizes else "-"


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "nothing measured"
    median, p99 = (quantile(seconds, share) * 1e3 for share in (0.5, 0.99))
    return f"{median:.0f} ms (p99 {p99:.0f}, most {max(seconds) * 1e3:.0f}, n {len(seconds)})"
