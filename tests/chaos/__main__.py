"""``python -m tests.chaos SCENARIO --count N --seed S``: attack a daemon and judge what it did."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import report
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.trial import run
from tests.integration.fork_servers import ForkServers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    attack = commands.add_parser("attack", help="run one scenario")
    attack.add_argument("scenario", choices=SCENARIOS)
    attack.add_argument("--count", type=int, required=True, help="blows, kills or stops")
    attack.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    attack.add_argument("--json", type=Path, help="write what happened")
    table = commands.add_parser("report", help="print docs/reliability.md")
    table.add_argument("files", type=Path, nargs="+", help="written by --json")
    options = parser.parse_args()
    if options.command == "report":
        sys.stdout.write(report.page([json.loads(file.read_text()) for file in options.files]))
        return 0
    return _attack(options)


def _attack(options: argparse.Namespace) -> int:
    sys.stdout.write(f"{options.scenario}, {options.count} times, seed {options.seed}\n")
    with tempfile.TemporaryDirectory() as home:
        fork_servers = ForkServers(Path(home) / "fork-servers")
        try:
            found = run(options.scenario, options.count, options.seed, Path(home), fork_servers)
        finally:
            fork_servers.end()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    sys.stdout.write(report.summary(found))
    return 1 if found["wrongs"] else 0


if __name__ == "__main__":
    sys.exit(main())
