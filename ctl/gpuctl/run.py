"""``gpuctl run``: a command in the foreground, with GPUs to itself.

The lease belongs to this process. If it is killed, the daemon sees that at once, waits until the
command's memory is gone, and brings the models back; the command itself dies with us.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpuctl import render
from gpuctl.client import Client
from gpuctl.conversation import Reply
from gpuctl.errors import GpuctlError
from gpuctl.protocol import LeaseAcquire, LeaseRelease

NOT_STARTED = 125
"""Instead of 1, which may as well be the command's own."""
NOT_EXECUTABLE = 126
NOT_FOUND = 127
UNSPECIFIC = GpuctlError.exit_status
PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def hand_over(client: Client, command: list[str], acquire: LeaseAcquire) -> int:
    """Take a lease, run the command, give the lease back; the command's exit status.

    Raises:
        GpuctlError: the lease could not be had; the command was not started.
    """
    _refuse_missing(command[0])
    granted = _acquire(client, acquire)
    with _postponed_signals() as caught:
        _tell(render.summary(granted.fields))
        try:
            visible = granted["cuda_visible_devices"] if acquire.gpus is not None else None
            with client.renewed(granted["lease"]):
                status = 128 + caught[0] if caught else _run(command, visible)
        finally:
            _give_back(client, granted["lease"]["id"])
    return status


def _refuse_missing(program: str) -> None:
    """Before anything is unloaded: a command that cannot start needs no GPU."""
    if shutil.which(program) is not None:
        return
    there = Path(program).exists()
    _tell(f"{program}: {'not executable' if there else 'not found'}")
    raise SystemExit(NOT_EXECUTABLE if there else NOT_FOUND)


class _Interrupted(KeyboardInterrupt):
    """A signal while we stand in line; the client takes its request back, as after ^C."""


def _acquire(client: Client, acquire: LeaseAcquire) -> Reply:
    """The lease; a signal before it is granted ends us, and what was begun is undone."""

    def interrupt(number: int, _: object) -> None:
        raise _Interrupted(number)

    try:
        with _handled_by(interrupt):
            return client.ask(acquire)
    except _Interrupted as stopped:
        _tell("interrupted; the command was not started")
        raise SystemExit(128 + stopped.args[0]) from None
    except GpuctlError as error:
        if error.exit_status == UNSPECIFIC:
            _tell(f"{error.message}; the command was not started")
            raise SystemExit(NOT_STARTED) from None
        raise


@contextlib.contextmanager
def _postponed_signals() -> Iterator[list[int]]:
    """Signals must not end us between the unload and the reload: note them, pass them on."""
    caught: list[int] = []
    with _handled_by(lambda number, _: caught.append(number)):
        yield caught


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (*PASSED_ON, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _run(command: list[str], visible: str | None) -> int:
    """The command in the foreground: same terminal, same group, so ^C and ^Z reach it as ever."""
    environ = dict(os.environ)
    if visible is not None:
        environ["CUDA_VISIBLE_DEVICES"] = visible
    try:
        child = subprocess.Popen(command, env=environ, preexec_fn=_die_with_gpuctl)  # noqa: PLW1509, S603
    except OSError as failed:
        _tell(f"{command[0]}: {failed.strerror}")
        return NOT_EXECUTABLE if failed.errno in {errno.EACCES, errno.ENOEXEC} else NOT_STARTED
    for number in PASSED_ON:
        signal.signal(number, lambda n, _: child.send_signal(n))
    status = child.wait()
    return 128 - status if status < 0 else status


def _die_with_gpuctl() -> None:
    """In the child, before exec: without us nobody would give its GPUs back in order."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    for number in (*PASSED_ON, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _give_back(client: Client, lease: str) -> None:
    """The models come back; a failure is told and does not hide the command's status."""
    try:
        released = client.ask(LeaseRelease(lease=lease))
    except GpuctlError as error:
        _tell(f"the models are not back: {error.message}")
        return
    _tell(render.summary(released.fields))


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone, the GPUs come back all the same
        sys.stderr.write(f"gpuctl: {line}\n")
