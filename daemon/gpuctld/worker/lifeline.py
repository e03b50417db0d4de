"""Ties a process's life to its parent's."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1
OOM_SCORE_ADJ = 500


def die_with(parent: int) -> None:
    """Have the kernel send SIGKILL when the parent ends; see prctl(2).

    ``parent`` is the pid that it had: if it has ended already, leave at once.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def volunteer_for_oom() -> None:
    """Under memory pressure the kernel shall take a worker, which comes back, not the daemon."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    except OSError:  # read-only /proc: the service manager has set its own policy
        return
