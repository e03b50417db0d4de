"""A CUDA device's memory and processes through NVML, which a helper process asks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PATIENCE_S = 2.0
"""For an answer of the driver; usually it takes a fraction of a millisecond."""

MAX_ANSWER = 1 << 16


class NvmlGauge:
    """A CUDA device through NVML, asked by a helper process that may be late.

    An answer that does not come in time leaves the last sample standing; :attr:`age_s` says how
    old it is. Before the first answer everything is zero.
    """

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._lock = threading.Lock()
        self._sampled_at = time.monotonic()
        self._samples: dict[str, Any] = {
            "memory": {"total": 0, "used": 0, "free": 0},
            "processes": [],
            "recovery": "",
        }
        self._start()

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "gpuctld.nvml", self._uuid]
        end = theirs.fileno()
        self._helper = subprocess.Popen(command, stdin=end, stdout=end)  # noqa: S603
        self._late = False
        theirs.close()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._sampled_at

    def memory(self) -> dict[str, int]:
        return dict(self._ask("memory"))

    def foreign(self) -> list[dict[str, Any]]:
        return [
            {"pid": pid, "name": _name(pid), "bytes": size}
            for pid, size in self._ask("processes")
            if pid != os.getpid()
        ]

    def residual(self) -> int:
        return int(sum(size for pid, size in self._ask("processes") if pid == os.getpid()))

    def recovery(self) -> str:
        return str(self._ask("recovery"))

    def _ask(self, what: str) -> Any:
        with self._lock, contextlib.suppress(OSError):
            if self._helper.poll() is not None:
                self._channel.close()
                self._start()
            if self._is_free():
                self._put(what)
        return self._samples[what]

    def _is_free(self) -> bool:
        """Whether nothing is asked: the helper gets one question at a time."""
        self._late = self._late and self._read(0.0) is None
        return not self._late

    def _put(self, what: str) -> None:
        self._channel.send(f"{what}\n".encode())
        answer = self._read(PATIENCE_S)
        self._late = answer is None
        if answer is not None:
            self._samples[what] = answer
            self._sampled_at = time.monotonic()

    def _read(self, seconds: float) -> Any:
        """The next answer, or ``None`` if there is none within that time."""
        self._channel.settimeout(seconds)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            packet = self._channel.recv(MAX_ANSWER)
            return json.loads(packet) if packet else None
        return None


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "unknown"
