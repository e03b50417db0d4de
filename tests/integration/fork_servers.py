"""Fork servers of their own, as systemd runs them: they outlive the daemons that they serve.

Nearly all that a daemon's start takes is the imports of its fork server. Tests whose daemons come
and go share these.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

LAUNCH = """
import os, sys
from gpuctld.worker import forkserver
os.environ["LISTEN_PID"] = str(os.getpid())
os.dup2(int(sys.argv[1]), forkserver.LISTEN_FD)
forkserver.IDLE_S = 600
sys.exit(forkserver.main([]))
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
                [sys.executable, "-c", LAUNCH, str(listener.fileno())],
                env={**environ, "GPUCTL_TEST_FAULTS": str(self._faults)},
                pass_fds=[listener.fileno()],
                stderr=log,
            )

    @property
    def free(self) -> bool:
        """The daemon that used it has ended, and it has not been told to leave."""
        gone = self._user is None or self._user.poll() is not None
        return gone and self.process.poll() is None

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
