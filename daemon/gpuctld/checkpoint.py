"""Takes a process's CUDA context off the GPU and puts it back: ``python -m gpuctld.checkpoint``.

The driver can move everything that a process has on a GPU, its context included, to host memory
and back (CUDA driver API, process checkpointing; driver 570 or newer). The controller has no
CUDA in it, so a helper process does it: it reads lines ``suspend PID`` and ``wake PID`` and
answers each with one line of JSON, ``{"ok", "duration_s", "error"}``. It creates no context itself.

Suspend only parked workers whose host memory is unpinned and that hold no peer's memory: then
there is nearly nothing to move (0.4 s down, 0.3 s up), and no shared memory to refuse.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

LOCK_TIMEOUT_MS = 10_000


class CheckpointRefused(Exception):
    """The driver is too old, or does not checkpoint this process now; says which."""


class Checkpoints:
    """The driver's side of it."""

    def __init__(self) -> None:
        from cuda.bindings import driver  # noqa: PLC0415  absent on machines without GPUs

        self._cuda = driver
        self._call(driver.cuInit, 0)

    def _call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> None:
        try:
            error, *_ = function(*arguments)
        except RuntimeError as missing:  # the bindings know the call and the driver does not
            raise CheckpointRefused(f"the driver is too old: {missing}") from None
        if error != self._cuda.CUresult.CUDA_SUCCESS:
            raise CheckpointRefused(f"{function.__name__}: {error.name}")

    def suspend(self, pid: int) -> None:
        """Take the process off the GPU; its CUDA calls wait until it is woken.

        Raises:
            CheckpointRefused: the process runs on as before.
        """
        lock = self._cuda.CUcheckpointLockArgs()
        lock.timeoutMs = LOCK_TIMEOUT_MS
        self._call(self._cuda.cuCheckpointProcessLock, pid, lock)
        try:
            arguments = self._cuda.CUcheckpointCheckpointArgs()
            self._call(self._cuda.cuCheckpointProcessCheckpoint, pid, arguments)
        except CheckpointRefused:
            self._unlock(pid)
            raise

    def wake(self, pid: int) -> None:
        """Put the process back onto its GPU.

        Raises:
            CheckpointRefused: for one, the GPU has no room for the context.
        """
        arguments = self._cuda.CUcheckpointRestoreArgs()
        self._call(self._cuda.cuCheckpointProcessRestore, pid, arguments)
        self._unlock(pid)

    def _unlock(self, pid: int) -> None:
        arguments = self._cuda.CUcheckpointUnlockArgs()
        self._call(self._cuda.cuCheckpointProcessUnlock, pid, arguments)


def answer(checkpoints: Checkpoints, line: str) -> dict[str, Any]:
    """Do what a line says; the answer for it."""
    verb, pid = line.split()
    started = time.perf_counter()
    error = ""
    try:
        {"suspend": checkpoints.suspend, "wake": checkpoints.wake}[verb](int(pid))
    except CheckpointRefused as refused:
        error = str(refused)
    return {"ok": not error, "duration_s": time.perf_counter() - started, "error": error}


def main() -> None:
    """Serve until standard input ends."""
    checkpoints = Checkpoints()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(checkpoints, line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
