from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_settings_of_the_developers_own(monkeypatch):
    """A GPUCTL_SOCKET of somebody's shell must not lead a test to their daemon."""
    for name in [each for each in os.environ if each.startswith("GPUCTL_")]:
        monkeypatch.delenv(name)
