from __future__ import annotations

import signal

import pytest

from tests.integration.daemon import Daemon


@pytest.fixture(scope="session")
def shared_daemon(tmp_path_factory, fork_servers):
    """One daemon for all tests that leave it as they found it."""
    daemon = Daemon(tmp_path_factory.mktemp("shared"), fork_servers=fork_servers).start()
    yield daemon
    assert daemon.stop() == 0


@pytest.fixture
def daemon(shared_daemon):
    """The shared daemon with ``shapes`` loaded and ``shapes-edit`` absent."""
    client = shared_daemon.client()
    client.drop("shapes-edit")
    client.load("shapes")
    return shared_daemon


@pytest.fixture
def own_daemon(tmp_path, fork_servers):
    """A daemon of the test's own, to be killed or filled with faults."""
    made: list[Daemon] = []

    def make(*args, **options) -> Daemon:
        made.append(Daemon(tmp_path, *args, **{"fork_servers": fork_servers, **options}))
        return made[-1].start()

    yield make
    for each in made:
        if each.process is not None and each.process.poll() is None:
            each.stop(signal.SIGKILL)
