"""The process that workers are forked from, started by hand."""

import signal
import time

import psutil
import pytest

from tests.integration.daemon import states


@pytest.fixture
def daemon(own_daemon):
    """A daemon, and its fork server."""
    daemon = own_daemon(2, fork_servers=None)
    return daemon, fork_server(daemon)


def fork_server(daemon, seconds=0.0):
    main = psutil.Process(daemon.process.pid)
    deadline = time.monotonic() + seconds
    while not (children := main.children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    [server] = children
    return server


def runs(process):
    """False also for one that waits to be reaped."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_killed_it_takes_the_workers_and_all_come_back(daemon):
    daemon, server = daemon
    daemon.client().load("shapes")
    workers = [psutil.Process(pid) for pid in daemon.worker_pids()]
    server.kill()
    deadline = time.monotonic() + 1
    while any(runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    daemon.wait_for(lambda status: states(status) == ["loaded", "loaded"], 60)


def test_a_daemon_that_is_stopped_during_the_imports_ends_at_once_and_leaves_nothing(daemon):
    daemon, server = daemon
    server.kill()
    server.wait(1)
    second = fork_server(daemon, seconds=5)
    assert daemon.stop(signal.SIGTERM) == 0
    assert not runs(second)
