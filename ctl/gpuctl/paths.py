"""Where the daemon's socket is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SYSTEM_SOCKET = "/run/gpuctl/gpuctl.sock"


def default_socket(environ: Mapping[str, str] = os.environ) -> str:
    """``$GPUCTL_SOCKET``, else the user's own daemon, else the system's service."""
    named = environ.get("GPUCTL_SOCKET")
    if named:
        return named
    own = user_socket(environ)
    if not own.exists() and Path(SYSTEM_SOCKET).exists():
        return f"ipc://{SYSTEM_SOCKET}"
    return f"ipc://{own}"


def user_socket(environ: Mapping[str, str] = os.environ) -> Path:
    """The socket of a daemon that this user runs."""
    runtime = environ.get("XDG_RUNTIME_DIR") or f"/tmp/gpuctl-{os.getuid()}"  # noqa: S108
    return Path(runtime) / "gpuctl" / "gpuctl.sock"
