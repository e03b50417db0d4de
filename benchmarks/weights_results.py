"""What benchmarks/weights.py has found so far, on disk after every sample: a run may be cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Results:
    """A list of samples per measurement, and why arms could not be measured, in ``path``."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        self._results: dict[str, Any] = {
            "about": about,
            "complete": False,
            "failed": {},
            "found": {},
        }
        self._save()

    def note(self, name: str, sample: Any) -> None:
        """Add a sample."""
        self._results["found"].setdefault(name, []).append(sample)
        self._save()

    def fail(self, arm: str, why: str) -> None:
        """An arm has ended with an error."""
        self._results["failed"][arm] = why
        self._save()

    def end(self) -> None:
        """All has been tried."""
        self._results["complete"] = True
        self._save()

    def _save(self) -> None:
        """Replace the file: whoever reads it finds the state before or after."""
        fresh = self._path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self._results))
        fresh.replace(self._path)
