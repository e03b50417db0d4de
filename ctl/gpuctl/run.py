"""``gpuctl run``: a command in the foreground, with GPUs to itself.

The lease belongs to this process. If it is killed, the daemon sees that at once, waits until the
command's memory is gone, and brings the models back; the command itself dies with us.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gpuctl import render
from gpuctl.client import Client
from gpuctl.conversation import Reply
from gpuctl.errors import GpuctlError
from gpuctl.protocol import LeaseAcquire, LeaseRelease

NOT_STARTED = 125
"""Instead of 1, which may as well be the command's own."""
NOT_EXECUTABLE = 126
NOT_FOUND = 127
_WHY_NOT = {errno.ENOENT: NOT_FOUND, errno.EAGAIN: NOT_STARTED, errno.ENOMEM: NOT_STARTED}
"""Status by what the start failed with; the rest is the program's own fault."""
UNSPECIFIC = GpuctlError.exit_status
FROM_TERMINALS = {signal.SIGINT, signal.SIGQUIT}
PASSED_ON = {*FROM_TERMINALS, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
SI_KERNEL = 0x80
"""sigaction(2): the terminal's driver sent it, and no process."""
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def hand_over(client: Client, command: list[str], acquire: LeaseAcquire) -> int:
    """Take a lease, run the command, give the lease back; the command's exit status.

    Raises:
        GpuctlError: the lease could not be had; the command was not started.
    """
    _refuse_missing(command[0])
    granted = _acquire(client, acquire)
    with _held_signals() as held:
        _tell(render.summary(granted.fields))
        try:
            visible = granted["cuda_visible_devices"] if acquire.gpus is not None else None
            with client.renewed(granted["lease"]):
                status = _run(command, visible, held)
        finally:
            _give_back(client, granted["lease"]["id"])
    return status


def _refuse_missing(program: str) -> None:
    """Before anything is unloaded: a command that cannot start needs no GPU."""
    if _is_there(program):
        return
    there = Path(program).exists()
    _tell(f"{program}: {'not executable' if there else 'not found'}")
    raise SystemExit(NOT_EXECUTABLE if there else NOT_FOUND)


def _is_there(program: str) -> bool:
    """As :func:`shutil.which` finds it, whose import takes as long as all of this module's."""
    folders = [""] if os.sep in program else os.get_exec_path()
    places = [os.path.join(folder, program) for folder in folders]  # noqa: PTH118  "" is allowed
    return any(os.access(place, os.X_OK) and not os.path.isdir(place) for place in places)  # noqa: PTH112


class _Interrupted(KeyboardInterrupt):
    """A signal while we stand in line; the client takes its request back, as after ^C."""


def _acquire(client: Client, acquire: LeaseAcquire) -> Reply:
    """The lease; a signal before it is granted ends us, and what was begun is undone."""

    def interrupt(number: int, _: object) -> None:
        raise _Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in _heeded()}
    try:
        return client.ask(acquire)
    except _Interrupted as stopped:
        _tell("interrupted; the command was not started")
        raise SystemExit(128 + stopped.args[0]) from None
    except GpuctlError as error:
        if error.exit_status == UNSPECIFIC:
            _tell(f"{error.message}; the command was not started")
            raise SystemExit(NOT_STARTED) from None
        raise
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _heeded() -> set[signal.Signals]:
    """Without those that whoever started us wants ignored: nohup, a shell's background job."""
    return {number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}


@contextlib.contextmanager
def _held_signals() -> Iterator[set[signal.Signals]]:
    """Signals must not end us between the unload and the reload: they wait until asked for."""
    held = _heeded()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*held, signal.SIGCHLD})
    try:
        yield held
    finally:
        while signal.sigtimedwait(held, 0):
            pass  # too late for the command
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(command: list[str], visible: str | None, held: set[signal.Signals]) -> int:
    """The command in the foreground: same terminal, same group, so ^C and ^Z reach it as ever."""
    environ = dict(os.environ)
    if visible is not None:
        environ["CUDA_VISIBLE_DEVICES"] = visible
    if early := signal.sigtimedwait(held, 0):
        return 128 + early.si_signo
    prepare = functools.partial(_prepare_command, os.getpid(), held)
    try:
        child = subprocess.Popen(command, env=environ, preexec_fn=prepare)  # noqa: PLW1509, S603
    except OSError as failed:
        _tell(f"{command[0]}: {failed.strerror}")
        return _WHY_NOT.get(failed.errno or 0, NOT_EXECUTABLE)
    while early := signal.sigtimedwait(held, 0):  # the terminal's may have come before the child
        child.send_signal(early.si_signo)
    return _status(child, held)


def _prepare_command(parent: int, held: set[signal.Signals]) -> None:
    """In the child, before exec: without us nobody would give its GPUs back in order."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it has died already: that signal will never come
        os._exit(128 + signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*held, signal.SIGCHLD})


def _status(child: subprocess.Popen[bytes], held: set[signal.Signals]) -> int:
    """Pass signals on until the command has ended. A terminal's reach its group without us."""
    while (status := child.poll()) is None:
        told = signal.sigwaitinfo({*held, signal.SIGCHLD})
        from_terminal = told.si_code == SI_KERNEL and told.si_signo in FROM_TERMINALS
        if told.si_signo in held and not from_terminal:
            child.send_signal(told.si_signo)
    return 128 - status if status < 0 else status


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
