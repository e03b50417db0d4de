"""Who comes to the sockets, and who is not let in; ``tests/chaos/floods.py`` has the attacks."""

from __future__ import annotations

import time
from unittest.mock import patch

import pytest
import zmq

from gpuctl import protocol
from gpuctl.errors import NoDaemon
from tests.chaos.floods import DESCRIPTORS, connected, silence
from tests.integration.daemon import Daemon

ANSWER_MS = 5_000


def test_who_is_not_let_in_is_told_so(own_daemon):
    daemon: Daemon = own_daemon(
        workers=1, under=("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}")
    )
    inside = daemon.client()
    inside.ping()
    with silence(daemon.endpoint.removeprefix("ipc://"), 600):
        wait_until_shut(inside)
        with pytest.raises(NoDaemon) as refused, patch("gpuctl.client.PING_S", 0.5):
            daemon.client().ping()
    assert f"pid {daemon.process.pid}" in refused.value.hint


def wait_until_shut(inside):
    deadline = time.monotonic() + 1
    while not (problems := inside.status()["daemon"]["degraded"]):
        assert time.monotonic() < deadline
    assert "no new connections" in problems[0]


def test_of_two_clients_with_one_routing_id_the_first_is_served(shared_daemon):
    with connected(shared_daemon, b"same") as first:
        assert_answered(first)
        with connected(shared_daemon, b"same") as second:
            for _ in range(50):
                assert_answered(first)
            second.send_multipart(protocol.encode(protocol.Ping()))
            assert not second.poll(500), "nobody gets another's answers"


def assert_answered(client: zmq.Socket) -> None:
    client.send_multipart(protocol.encode(asked := protocol.Ping()))
    assert client.poll(ANSWER_MS)
    assert protocol.decode_reply(client.recv_multipart())[0]["id"] == asked.id
