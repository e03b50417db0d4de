from __future__ import annotations

import os

import pytest

from tests.integration.fork_servers import ForkServers


def silent(done, total):
    """A progress callback that nobody watches."""


@pytest.fixture
def descriptor():
    """An anonymous file for a host copy."""
    made = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    yield made
    os.close(made)


@pytest.fixture(autouse=True)
def _no_settings_of_the_developers_own(monkeypatch):
    """A GPUCTL_SOCKET of somebody's shell must not lead a test to their daemon."""
    for name in [each for each in os.environ if each.startswith("GPUCTL_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def fork_servers(tmp_path_factory):
    """Where the daemons of all tests get their workers, unless a test is about that."""
    made = ForkServers(tmp_path_factory.mktemp("fork-servers"))
    yield made
    made.end()
