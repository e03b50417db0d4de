"""Fork servers of their own, as systemd runs them, whose imports outlive even an orderly stop.

Nearly all that a daemon's start takes is the imports of its fork server. Tests whose daemons come
and go share these: a process that has imported everything, and has a child be the fork server, one
after the other.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

KEEP = """
import os, socket, sys
from gpuctld.service_manager import Notifier
from gpuctld.worker import forkserver
from gpuctld.worker.lifeline import die_with

die_with(int(sys.argv[2]))
listener = socket.socket(fileno=int(sys.argv[1]))
forkserver.preload()
forkserver.preload = lambda: None
keeper = os.getpid()
while True:
    child = os.fork()
    if child == 0:
        die_with(keeper)
        forkserver.serve_all(listener, Notifier())
        os._exit(0)
    os.waitpid(child, 0)
"""


class ForkServer:
    """One process, for one daemon after the other."""

    def __init__(self, home: Path, environ: dict[str, str]) -> None:
        home.mkdir()
        self.path = home / "fork.sock"
        self.path.with_suffix("").mkdir(mode=0o700)
        self._faults = home / "faults.json"
        self._user: subprocess.Popen[bytes] | None = None
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
            (home / "log").open("w") as log,
        ):
            listener.bind(str(self.path))
            listener.listen()
            self.process = subprocess.Popen(
                [sys.executable, "-c", KEEP, str(listener.fileno()), str(os.getpid())],
                env={**environ, "GPUCTL_TEST_FAULTS": str(self._faults)},
                pass_fds=[listener.fileno()],
                stderr=log,
            )

    @property
    def free(self) -> bool:
        """The daemon that used it has ended."""
        return self._user is None or self._user.poll() is not None

    def serve(self, daemon: subprocess.Popen[bytes], faults: Path) -> None:
        """From now on this daemon, and its faults."""
        self._user = daemon
        self._faults.unlink(missing_ok=True)
        self._faults.symlink_to(faults)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class ForkServers:
    """As many as there are daemons at a time."""

    def __init__(self, home: Path) -> None:
        home.mkdir(exist_ok=True)
        self._home = home
        self._all: list[ForkServer] = []

    def borrow(self, environ: dict[str, str]) -> ForkServer:
        """One that is free, or a new one."""
        for each in self._all:
            if each.free:
                return each
        made = ForkServer(self._home / str(len(self._all)), environ)
        self._all.append(made)
        return made

    def end(self) -> None:
        for each in self._all:
            each.end()
