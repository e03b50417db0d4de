"""One daemon per socket: a lock that is taken before the socket is bound.

A second bind on a live ipc path would silently steal new clients, so the lock comes first.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

from gpuctl.errors import Busy
from gpuctl.paths import noted

NOTED_S = 2.0
"""The holder notes itself right behind taking the lock; until then an earlier one may be noted.

Half a second was too short once in 500 times, when six other processes wanted the two cores.
"""


def acquire(path: Path) -> TextIO:
    """Hold ``path`` until the process ends; the kernel lets go of it however that happens.

    Raises:
        Busy: another daemon holds it; the message has its pid.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        holder = _holder(path)
        raise Busy(f"another gpuctld serves this socket, pid {holder}", f"{path}") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _holder(path: Path) -> str:
    """The pid in the file, as soon as it is that of a living process."""
    deadline = time.monotonic() + NOTED_S
    while time.monotonic() < deadline:
        pid = noted(path)
        if pid is not None:
            return str(pid)
        time.sleep(0.01)
    return "unknown"
