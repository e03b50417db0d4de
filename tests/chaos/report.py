"""What the attacks have shown, for a terminal and for docs/reliability.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.chaos.scenarios import SCENARIOS

Found = dict[str, Any]

HEADING = """# Reliability

What `make chaos` saw: a real daemon, two workers on CPU devices, eight clients at once that
generate, ask for the status, load, unload and reload, while the daemon or its workers are killed,
stopped and broken. Written by `python -m tests.chaos report`; no figure here was typed by hand.

A trial fails if a request has no answer or two, a job runs twice, a worker or the models do not
come back, a seeded picture changes, a process, a file or descriptors are left behind. No failure
in N tries means fewer than 3 / N with 95 % confidence.

"Back" runs from the end of a process: the silence before a stopped worker is ended (10 s) comes on
top. While the daemon itself is stopped, `status` waits for as long. Answers to clients whose daemon
is killed are not counted: they end with its connection.
"""

COLUMNS = (
    *("attack", "times", "failures", "below", "back, median / p99"),
    *("requests", "status p99", "memory"),
)


def summary(found: Found) -> str:
    """A few lines about one run."""
    codes = ", ".join(f"{count} {code}" for code, count in sorted(found["codes"].items()))
    lines = [
        f"{found['count']} in {found['seconds']:.0f} s, {len(found['wrongs'])} failures",
        *[f"  WRONG: {wrong}" for wrong in found["wrongs"]],
        f"  back after {_spread(found['took_s'])}; {found['revived']} revived",
        f"  {found['requests']} requests: {codes}",
        f"  status after {_spread(found['status_s'])}",
        f"  memory {_growth(found)}",
    ]
    return "\n".join(lines) + "\n"


def page(runs: Sequence[Found]) -> str:
    """docs/reliability.md."""
    rows = [_row(found) for found in runs]
    about = [_about(found) for found in runs]
    lines = [
        HEADING,
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *rows,
        "",
        "## The attacks",
        "",
        *about,
        "",
    ]
    return "\n".join(lines)


def _row(found: Found) -> str:
    failures = len(found["wrongs"])
    bound = f"{3 / found['count']:.2%}" if not failures else "-"
    back = f"{_quantile(found['took_s'], 0.5):.2f} / {_quantile(found['took_s'], 0.99):.2f} s"
    glance = f"{_quantile(found['status_s'], 0.99) * 1e3:.0f} ms" if found["status_s"] else "-"
    cells = [found["scenario"], found["count"], failures, bound, back]
    cells += [found["requests"] or "-", glance, _growth(found)]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _about(found: Found) -> str:
    what = (SCENARIOS[found["scenario"]].__doc__ or "").split("\n")[0]
    command = f"python -m tests.chaos attack {found['scenario']}"
    command += f" --count {found['count']} --seed {found['seed']}"
    took = f"{found['seconds'] / 60:.0f} min"
    return (
        f"- **{found['scenario']}**: {what} `{command}`; {found['date']}, {found['host']}, {took}."
    )


def _growth(found: Found) -> str:
    growth = found["growth_mib_per_h"]
    if growth is not None:
        return f"{growth:+.1f} MiB/h"
    return f"{found['memory_mib'][0]:.0f} -> {found['memory_mib'][-1]:.0f} MiB"


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "nothing measured"
    median, p99 = (_quantile(seconds, share) * 1e3 for share in (0.5, 0.99))
    return f"{median:.0f} ms (p99 {p99:.0f}, most {max(seconds) * 1e3:.0f}, n {len(seconds)})"


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
