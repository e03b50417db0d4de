"""What strangers can do to the sockets: the daemon lives, and others are served meanwhile."""

from __future__ import annotations

import contextlib
import socket
import time
from unittest.mock import patch

import psutil
import pytest

from gpuctl import Client
from gpuctl.errors import NoDaemon
from gpuctld.doors import HANDSHAKE_MS

DESCRIPTORS = 256


def path_of(daemon) -> str:
    return daemon.endpoint.removeprefix("ipc://")


def descriptors(daemon) -> int:
    return psutil.Process(daemon.process.pid).num_fds()


def until(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    assert condition()


@pytest.fixture
def narrow_daemon(own_daemon):
    """A daemon with few descriptors."""
    return own_daemon(workers=1, under=("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"))


@contextlib.contextmanager
def silent_connections(path: str, number: int):
    """Connections that say nothing; how many the kernel let through."""
    with contextlib.ExitStack() as opened:
        through = 0
        for _ in range(number):
            each = opened.enter_context(socket.socket(socket.AF_UNIX))
            each.settimeout(0.05)
            with contextlib.suppress(OSError):
                each.connect(path)
                through += 1
        yield through


def test_silent_connections_past_the_descriptor_limit(narrow_daemon):
    before = descriptors(narrow_daemon)
    inside = narrow_daemon.client()
    inside.ping()
    for _ in range(2):
        with silent_connections(path_of(narrow_daemon), 600) as through:
            assert DESCRIPTORS // 4 < through < 600
            assert descriptors(narrow_daemon) < DESCRIPTORS
            [problem] = inside.status()["daemon"]["degraded"]
            assert "no new connections" in problem
            until(lambda: not inside.status()["daemon"]["degraded"], 2 * HANDSHAKE_MS / 1000)
            with Client(narrow_daemon.endpoint, timeout=5) as newcomer:
                newcomer.ping()
    inside.close()
    until(lambda: descriptors(narrow_daemon) <= before, 10)
    assert narrow_daemon.stop() == 0
    assert [each.name for each in narrow_daemon.home.glob("gpuctl.*")] == ["gpuctl.lock"]


def test_who_is_not_let_in_is_told_so(narrow_daemon):
    inside = narrow_daemon.client()
    inside.ping()
    with silent_connections(path_of(narrow_daemon), 600):
        until(lambda: inside.status()["daemon"]["degraded"], 1)
        with pytest.raises(NoDaemon) as refused, patch("gpuctl.client.PING_S", 0.5):
            narrow_daemon.client().ping()
    assert f"pid {narrow_daemon.process.pid}" in refused.value.hint
