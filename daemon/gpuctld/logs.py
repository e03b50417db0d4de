"""Temporary: plain lines."""

from __future__ import annotations

import logging


def setup(level: str) -> None:
    """Log to stderr."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
