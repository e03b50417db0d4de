"""One daemon per socket: a lock that is taken before the socket is bound.

A second bind on a live ipc path would silently steal new clients, so the lock comes first.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO

from gpuctl.errors import Busy


def acquire(path: Path) -> TextIO:
    """Hold ``path`` until the process ends; the kernel lets go of it however that happens.

    Raises:
        Busy: another daemon holds it; the message has its pid.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise Busy(f"another gpuctld serves this socket, pid {holder}", f"{path}") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
