"""The command ``gpuctl``."""

from __future__ import annotations

import gc

GARBAGE_AT = 50_000
"""New objects before the collector looks; the imports make 18,000, and none of them is garbage."""


def main() -> None:
    """Entry point; without the collector's looks the imports take a twentieth less."""
    gc.set_threshold(GARBAGE_AT)
    from gpuctl.cli import app  # noqa: PLC0415  so that this holds for its imports

    app.main()
