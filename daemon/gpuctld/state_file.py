"""The fleet's snapshot, kept across restarts of the daemon and of the machine."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import attrs
from cattrs import BaseValidationError
from cattrs.preconf.json import make_converter

from gpuctld import logs
from gpuctld.fleet.snapshot import Snapshot

log = logging.getLogger(__name__)

SCHEMA = 1
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_converter = make_converter()


@attrs.frozen
class _Found:
    """What a file says, and under which boot of the machine it was written."""

    boot: str
    snapshot: Snapshot


class StateFile:
    """Two files of the same kind, each written whole or not at all: a new one is renamed over it.

    ``live`` is written before anything is done about a change, and outlives us. ``path`` is the
    same synced to disk, which takes milliseconds, and outlives the machine. ``problem`` says why
    the last write failed, or is empty.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "wanted.json"
        self.live = directory / "live.json"
        self.problem = ""
        self._boot = _boot()
        self._saved: Snapshot | None = None
        self._synced: Snapshot | None = None

    def read(self) -> Snapshot:
        """What was saved last; nothing if there is no file.

        A damaged file never stops the start: it is set aside and named in the log.
        """
        live, synced = self._read(self.live), self._read(self.path)
        for found in (live, synced):
            if found is not None and found.boot == self._boot:
                return found.snapshot
        return synced.snapshot.without_leases() if synced is not None else Snapshot()

    def _read(self, path: Path) -> _Found | None:
        try:
            return _parse(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError, BaseValidationError) as damaged:
            log.warning("state_file_damaged", extra=logs.fields(path=path, reason=damaged))
            self._set_aside(path)
            return None

    def _set_aside(self, path: Path) -> None:
        try:
            path.replace(path.with_suffix(".damaged"))
        except OSError as stuck:
            self.problem = f"state not saved: {stuck}"

    def save(self, snapshot: Snapshot) -> None:
        """Keep ``snapshot`` if it has changed; a failure is remembered in ``problem``."""
        if snapshot != self._saved and self._write(self.live, snapshot, sync=False):
            self._saved = snapshot

    def sync(self) -> None:
        """Have what was saved on disk as well; a failure is remembered in ``problem``."""
        saved = self._saved
        if saved is None or saved is self._synced:
            return
        if self._write(self.path, saved, sync=True):
            self._synced = saved

    def _write(self, path: Path, snapshot: Snapshot, *, sync: bool) -> bool:
        try:
            _replace(path, _text(snapshot, self._boot), sync=sync)
        except OSError as failed:
            self._complain(path, failed)
            return False
        self.problem = ""
        return True

    def _complain(self, path: Path, failed: OSError) -> None:
        """Once per problem: every change tries again."""
        problem = f"state not saved: {failed}"
        if problem != self.problem:
            log.error("state_not_saved", extra=logs.fields(path=path, reason=failed))
        self.problem = problem


def _replace(path: Path, text: str, *, sync: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    fresh.replace(path)


def _text(snapshot: Snapshot, boot: str) -> str:
    document = {"schema": SCHEMA, "boot": boot, **_converter.unstructure(snapshot)}
    return json.dumps(document, indent=1) + "\n"


def _parse(text: str) -> _Found:
    document = json.loads(text)
    return _Found(document.get("boot", ""), _converter.structure(document, Snapshot))


def _boot() -> str:
    """This boot of the machine, to which pids and the monotonic clock belong."""
    return BOOT_ID.read_text().strip()
