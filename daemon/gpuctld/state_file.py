"""What was loaded where, kept across restarts of the daemon."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from gpuctl.residency import Tier
from gpuctld import logs

log = logging.getLogger(__name__)

SCHEMA = 1


class StateFile:
    """Written whole or not at all: a new file is synced and then renamed over the old one.

    ``problem`` says why the last write failed, or is empty.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "wanted.json"
        self.problem = ""
        self._saved: dict[int, dict[str, str]] | None = None

    def read(self) -> dict[int, dict[str, str]]:
        """``{gpu: {model: tier}}``; empty if there is none.

        A damaged file never stops the start: it is set aside and named in the log.
        """
        try:
            return _parse(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as damaged:
            reason = logs.fields(path=self.path, reason=damaged)
            log.warning("state_file_damaged", extra=reason)
            self._set_aside()
            return {}

    def _set_aside(self) -> None:
        try:
            self.path.replace(self.path.with_suffix(".damaged"))
        except OSError as stuck:
            self.problem = f"state not saved: {stuck}"

    def save(self, wanted: dict[int, dict[str, str]]) -> None:
        """Keep ``wanted`` if it has changed; a failure is remembered in ``problem``."""
        if wanted == self._saved:
            return
        document = {"schema": SCHEMA, "wanted": {str(gpu): m for gpu, m in wanted.items()}}
        try:
            self._write(json.dumps(document, indent=1) + "\n")
        except OSError as failed:
            self._complain(failed)
            return
        self.problem = ""
        self._saved = wanted

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


def _parse(text: str) -> dict[int, dict[str, str]]:
    wanted = json.loads(text)["wanted"]
    return {
        int(gpu): {str(model): str(Tier(tier)) for model, tier in models.items()}
        for gpu, models in wanted.items()
    }
