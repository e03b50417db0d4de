"""One GPU after the other, or all at once: what a broadcast saves.

Six simulated devices whose unload and reload take two seconds each, through the real daemon, its
real processes and sockets. ``--seconds`` and ``--workers`` change that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tests.integration.daemon import FAULTY, Daemon


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    rows = measure(options.workers, options.seconds)
    table = Table(box=SIMPLE_HEAD)
    for name in ("operation", "serial", "broadcast", "ratio"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for name, serial, broadcast in rows:
        table.add_row(name, f"{serial:.2f} s", f"{broadcast:.2f} s", f"{serial / broadcast:.2f} x")
    Console().print(table)
    return 0


def measure(workers: int, seconds: float) -> list[tuple[str, float, float]]:
    """Operation, seconds in sequence, seconds by broadcast."""
    with tempfile.TemporaryDirectory() as home:
        daemon = Daemon(Path(home), workers, module=FAULTY).start()
        try:
            return _measure(daemon, workers, seconds)
        finally:
            daemon.stop()


def _measure(daemon: Daemon, workers: int, seconds: float) -> list[tuple[str, float, float]]:
    client = daemon.client(timeout=300)
    client.load("shapes")
    daemon.inject(
        *({"command": name, "delay_s": seconds} for name in ("UnloadModel", "ReloadModel"))
    )
    unloads = [client.unload(gpus=[gpu])["duration_s"] for gpu in range(workers)]
    serial_reload = client.reload(parallel=False)["duration_s"]
    return [
        ("unload", sum(unloads), client.unload()["duration_s"]),
        ("reload", serial_reload, client.reload()["duration_s"]),
    ]


if __name__ == "__main__":
    sys.exit(main())
