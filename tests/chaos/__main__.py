"""Attack a daemon and judge what it did: one scenario, or all of them at length."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.chaos import report, trial
from tests.chaos.scenarios import SCENARIOS
from tests.integration.fork_servers import ForkServers

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def main() -> int:
    options = _parser().parse_args()
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("attack", help="run one scenario")
    one.add_argument("scenario", choices=SCENARIOS)
    one.add_argument("--count", type=int, help="of blows, connections, ...; default: at length")
    one.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    one.set_defaults(run=_one)
    every = commands.add_parser("all", help="run every scenario at length")
    every.add_argument("--part", type=float, default=1.0, help="of the long runs' counts")
    every.set_defaults(run=_all)
    for each in (one, every):
        each.add_argument("--out", type=Path, default=Path("chaos-output"), help="for JSON files")
    table = commands.add_parser("report", help="put runs into docs/reliability.md")
    table.add_argument("files", type=Path, nargs="+", help="what the runs have written")
    table.set_defaults(run=_report)
    return parser


def _one(options: argparse.Namespace) -> int:
    count = options.count or SCENARIOS[options.scenario].at_length
    found = _attack(options.scenario, count, options.seed, options.out)
    return 1 if found["wrongs"] else 0


def _all(options: argparse.Namespace) -> int:
    failed = 0
    for name, scenario in SCENARIOS.items():
        if scenario.needs_gpu and not torch.cuda.is_available():
            sys.stdout.write(f"{name} is left out: no CUDA GPU\n")
            continue
        seed = time.time_ns() % 2**32
        count = max(1, round(scenario.at_length * options.part))
        found = _attack(name, count, seed, options.out)
        failed += bool(found["wrongs"])
    return 1 if failed else 0


def _attack(name: str, count: int, seed: int, out: Path) -> dict[str, Any]:
    sys.stdout.write(f"{name}, {count} times, seed {seed}\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as home:
        fork_servers = ForkServers(Path(home) / "fork-servers")
        try:
            found = trial.run(name, SCENARIOS[name], count, seed, Path(home), fork_servers)
        finally:
            fork_servers.end()
            out.mkdir(exist_ok=True)
            shutil.copy(Path(home) / name / "log", out / f"{name}.log")  # what the daemon said
    report.save(found, out)
    sys.stdout.write(report.summary(found))
    return found


def _report(options: argparse.Namespace) -> int:
    runs = [json.loads(file.read_text()) for file in options.files]
    PAGE.write_text(report.updated(PAGE.read_text(), runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
