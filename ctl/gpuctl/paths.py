"""Where the daemon's socket is, and others that matter."""

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
    if not own.exists() and _is_there(Path(SYSTEM_SOCKET)):
        return f"ipc://{SYSTEM_SOCKET}"
    return f"ipc://{own}"


def _is_there(path: Path) -> bool:
    """Also when only the group of the service may look: the refusal is then told at connecting."""
    try:
        return path.exists()
    except PermissionError:
        return True


def permitted(endpoint: str) -> bool:
    """Whether this user may connect; true as well when there is nothing to connect to."""
    path = Path(endpoint.removeprefix("ipc://"))
    try:
        return not path.exists() or os.access(path, os.W_OK)
    except PermissionError:
        return False


def holder(endpoint: str) -> int | None:
    """The daemon that has noted itself in the socket's lock file, if that process lives.

    Asking for the lock itself could make a daemon that starts at this moment give up.
    """
    return noted(Path(endpoint.removeprefix("ipc://")).with_suffix(".lock"))


def noted(lock: Path) -> int | None:
    """The process that a lock file names, if it lives."""
    try:
        pid = int(lock.read_text())
    except (OSError, ValueError):
        return None
    return pid if Path(f"/proc/{pid}").exists() else None


def user_socket(environ: Mapping[str, str] = os.environ) -> Path:
    """The socket of a daemon that this user runs."""
    runtime = environ.get("XDG_RUNTIME_DIR") or f"/tmp/gpuctl-{os.getuid()}"  # noqa: S108
    return Path(runtime) / "gpuctl" / "gpuctl.sock"


def mps_control(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The pipe of a CUDA MPS server that our processes would use, if there is one.

    See the chapter "Environment Variables" of NVIDIA's documentation of MPS.
    """
    pipes = environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"  # noqa: S108
    control = Path(pipes) / "control"
    return control if control.exists() else None
