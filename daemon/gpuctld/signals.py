"""Signals as words that the main loop reads from a pipe."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator

WORDS = {
    signal.SIGTERM: "stop",
    signal.SIGINT: "stop",
    signal.SIGHUP: "reload",
}


class SignalPipe:
    """Installs handlers that only wake the loop; the kernel writes the signal's number."""

    def __init__(self) -> None:
        self._reader, writer = socket.socketpair()
        self._writer = writer
        self._reader.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in WORDS:
            signal.signal(number, lambda *_: None)

    @property
    def descriptor(self) -> int:
        return self._reader.fileno()

    def take(self) -> Iterator[str]:
        """The words of the signals that have come."""
        with contextlib.suppress(BlockingIOError):
            for number in self._reader.recv(64):
                if number in WORDS:
                    yield WORDS[signal.Signals(number)]
