"""Logging: one structured record per line, to the journal with fields or to stderr as text.

Give fields through ``extra``, by way of :func:`fields`; the message names the event::

    log.info("worker_lost", extra=fields(gpu=2, pid=4711, reason="killed by signal 9"))

The journal gets ``MESSAGE=worker_lost gpu=2 ...`` and ``GPUCTL_EVENT``, ``GPUCTL_GPU``, ... to
search for; a terminal gets the same line behind a time stamp.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

JOURNAL_SOCKET = Path("/run/systemd/journal/socket")
LEVELS = ("debug", "info", "warning", "error")
MAX_FIELD = 16_384
"""Bytes of one field; a datagram must stay below the socket's send buffer."""

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG_PRIORITY = 7


def fields(**values: Any) -> dict[str, Any]:
    """The ``extra=`` argument that carries ``values`` as the record's fields."""
    return {"gpuctl_fields": values}


def setup(level: str = "info") -> None:
    """Send every log record of this process to the journal, or to stderr outside of it.

    Raises:
        ValueError: ``level`` is not one of :data:`LEVELS`.
    """
    if level not in LEVELS:
        raise ValueError(f"{level!r} is not a log level: {', '.join(LEVELS)}")
    logging.basicConfig(level=level.upper(), handlers=[_handler()], force=True)


def _handler() -> logging.Handler:
    if not _stderr_is_journal():
        return _text_handler()
    try:
        return JournalHandler(JOURNAL_SOCKET)
    except OSError:
        return _text_handler(PriorityFormatter())


def _text_handler(formatter: logging.Formatter | None = None) -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(formatter or TextFormatter())
    return handler


def _stderr_is_journal() -> bool:
    """``JOURNAL_STREAM`` names stderr's device and inode, unless it was redirected since."""
    try:
        stat = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def priority(level: int) -> int:
    """The syslog priority of a logging level."""
    return next((number for floor, number in _PRIORITIES if level >= floor), _DEBUG_PRIORITY)


def line(record: logging.LogRecord) -> str:
    """``event key=value ...`` on one line; values with spaces or quotes are JSON strings."""
    pairs = [f"{key}={_quoted(value)}" for key, value in record_fields(record).items()]
    return " ".join([record.getMessage().replace("\n", "\\n"), *pairs])


def record_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What :func:`fields` was given, and the traceback, if there is one, as ``exception``."""
    found = dict(getattr(record, "gpuctl_fields", {}))
    if record.exc_info:
        found["exception"] = logging.Formatter().formatException(record.exc_info)
    return found


def _quoted(value: Any) -> str:
    text = str(value)
    plain = text.isprintable() and text and not set(text) & set(" \"'=\\")
    return text if plain else json.dumps(text, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z warning gpuctld.fleet: event key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{seconds}.{int(record.msecs):03d}Z"
        return f"{stamp} {record.levelname.lower()} {record.name}: {line(record)}"


class PriorityFormatter(logging.Formatter):
    """``<4>event key=value``, the prefix that journald reads from a service's stderr."""

    def format(self, record: logging.LogRecord) -> str:
        return f"<{priority(record.levelno)}>{line(record)}"


class JournalHandler(logging.Handler):
    """Sends records in the journal's native protocol, never blocking.

    The protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/

    Raises:
        OSError: nothing listens at ``path``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_UNIX, kind)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._socket.send(encode(record))
        except Exception:  # noqa: BLE001 - logging's own contract: report on stderr and go on
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()


def encode(record: logging.LogRecord) -> bytes:
    """A record as one datagram of the journal's native protocol."""
    own = {
        "MESSAGE": line(record),
        "PRIORITY": priority(record.levelno),
        "SYSLOG_IDENTIFIER": "gpuctld",
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "GPUCTL_EVENT": record.getMessage(),
    }
    given = {_field_name(key): value for key, value in record_fields(record).items()}
    return b"".join(_encode_field(name, str(value)) for name, value in (own | given).items())


def _field_name(key: str) -> str:
    """Journal fields are upper-case ASCII letters, digits and underscores, at most 64."""
    legal = (c if c.isascii() and c.isalnum() else "_" for c in key.upper())
    return ("GPUCTL_" + "".join(legal))[:64]


def _encode_field(name: str, value: str) -> bytes:
    """Text with a line break travels with its length in front, 64 bits little-endian."""
    data = value.encode(errors="backslashreplace")[:MAX_FIELD]
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
