"""A good client beside an attack: what it has to wait for the status."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Self

from tests.integration.daemon import Daemon

STEADY = """
import json, select, sys, time
from gpuctl import Client
took = []
with Client(sys.argv[1], timeout=20) as client:
    print(client.status()["daemon"]["pid"], flush=True)
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        start = time.perf_counter()
        client.status()
        took.append(time.perf_counter() - start)
print(json.dumps(took))
"""
LEAVES_S = 30


class Onlooker:
    """Asks every 10 ms, in a process of its own, while a ``with`` block runs.

    Adds the seconds of each answer to ``glances_s``, and a client that was let down to ``wrongs``.
    """

    def __init__(self, daemon: Daemon, glances_s: list[float], wrongs: list[str]) -> None:
        self._glances_s, self._wrongs = glances_s, wrongs
        self._process = subprocess.Popen(
            [sys.executable, "-c", STEADY, daemon.endpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=daemon.environ,
        )

    def __enter__(self) -> Self:
        self._process.stdout.readline()  # it has been answered once
        return self

    def __exit__(self, *_: object) -> None:
        took, complaint = self._process.communicate(timeout=LEAVES_S)
        if self._process.returncode:
            self._wrongs.append(f"a good client was let down: {complaint.splitlines()[-1:]}")
        else:
            self._glances_s += json.loads(took)
