"""The fleet's snapshot, kept across restarts of the daemon."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from cattrs import BaseValidationError
from cattrs.preconf.json import make_converter

from gpuctld import logs
from gpuctld.fleet.snapshot import Snapshot

log = logging.getLogger(__name__)

SCHEMA = 1
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_converter = make_converter()


class StateFile:
    """Written whole or not at all: a new file is synced and then renamed over the old one.

    ``problem`` says why the last write failed, or is empty.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "wanted.json"
        self.problem = ""
        self._saved: Snapshot | None = None

    def read(self) -> Snapshot:
        """What was saved last; nothing if there is no file.

        A damaged file never stops the start: it is set aside and named in the log.
        """
        try:
            return _parse(self.path.read_text())
        except FileNotFoundError:
            return Snapshot()
        except (OSError, ValueError, TypeError, AttributeError, BaseValidationError) as damaged:
            reason = logs.fields(path=self.path, reason=damaged)
            log.warning("state_file_damaged", extra=reason)
            self._set_aside()
            return Snapshot()

    def _set_aside(self) -> None:
        try:
            self.path.replace(self.path.with_suffix(".damaged"))
        except OSError as stuck:
            self.problem = f"state not saved: {stuck}"

    def save(self, snapshot: Snapshot) -> None:
        """Keep ``snapshot`` if it has changed; a failure is remembered in ``problem``."""
        if snapshot == self._saved:
            return
        try:
            self._write(_text(snapshot))
        except OSError as failed:
            self._complain(failed)
            return
        self.problem = ""
        self._saved = snapshot

    def _complain(self, failed: OSError) -> None:
        """Once per problem: every change tries again."""
        problem = f"state not saved: {failed}"
        if problem != self.problem:
            log.error("state_not_saved", extra=logs.fields(path=self.path, reason=failed))
        self.problem = problem

    def _write(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)


def _text(snapshot: Snapshot) -> str:
    document = {"schema": SCHEMA, "boot": _boot(), **_converter.unstructure(snapshot)}
    return json.dumps(document, indent=1) + "\n"


def _parse(text: str) -> Snapshot:
    document = json.loads(text)
    snapshot = _converter.structure(document, Snapshot)
    return snapshot if document.get("boot") == _boot() else snapshot.without_leases()


def _boot() -> str:
    """This boot of the machine, to which pids and the monotonic clock belong."""
    return BOOT_ID.read_text().strip()
