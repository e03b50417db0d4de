"""Tell the service manager how the daemon is: the sending side of systemd's sd_notify(3).

Nothing here blocks or raises: a service manager that does not listen must not stop the daemon.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Self

import attrs


def _address(path: str) -> str | None:
    """The socket's address; systemd writes an abstract one with a leading ``@``."""
    if path.startswith("@"):
        return "\0" + path[1:]
    return path if path.startswith("/") else None


def _watchdog_interval_s(environ: Mapping[str, str], pid: int) -> float | None:
    """Seconds within which the manager wants a sign of life; ``None`` when it wants none."""
    if int(environ.get("WATCHDOG_PID", pid)) != pid:
        return None
    microseconds = int(environ.get("WATCHDOG_USEC", "0"))
    return microseconds / 1e6 or None


@attrs.frozen
class Notifier:
    """Sends states to the service manager; silent when there is none.

    ``address``: the manager's datagram socket. ``watchdog_interval_s``: the manager's limit; call
    :meth:`watchdog` at least twice within it, and only when the main loop has truly turned.
    """

    address: str | None = None
    watchdog_interval_s: float | None = None

    @classmethod
    def from_environment(cls) -> Self:
        """Take ``NOTIFY_SOCKET`` and the watchdog's variables out of the environment.

        Taken out, so that no worker can speak for the daemon.

        Raises:
            ValueError: the service manager's watchdog variables are not numbers.
        """
        interval = _watchdog_interval_s(os.environ, os.getpid())
        address = _address(os.environ.pop("NOTIFY_SOCKET", ""))
        os.environ.pop("WATCHDOG_USEC", None)
        os.environ.pop("WATCHDOG_PID", None)
        return cls(address, interval if address else None)

    def ready(self) -> None:
        """The socket is bound and every worker is up; also ends a reload."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The configuration is being read again; follow with :meth:`ready`."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``, such as ``loading flux on gpu 2, 61 %``."""
        self._send("STATUS=" + " ".join(text.splitlines()))

    def watchdog(self) -> None:
        """A full turn of the main loop was made."""
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if self.address is None:
            return
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as sender:
            sender.sendto(state.encode(), self.address)
