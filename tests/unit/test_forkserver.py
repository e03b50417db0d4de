"""When the fork server of the service leaves, and when it waits for the next controller."""

import socket
import threading

import pytest

from gpuctld.messages import Fork, Leave, encode
from gpuctld.service_manager import Notifier
from gpuctld.worker import forkserver


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A thread that serves, with nothing imported, and the path where it listens."""
    monkeypatch.setattr(forkserver, "preload", lambda: None)
    monkeypatch.setattr(forkserver, "IDLE_S", 0.3)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "fork.sock"))
    listener.listen()
    thread = threading.Thread(target=forkserver.serve_all, args=(listener, Notifier()))
    thread.start()
    yield thread, str(tmp_path / "fork.sock")
    thread.join()
    listener.close()


def connect(path):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path)
    return connection


def test_without_a_controller_it_leaves(server):
    thread, _ = server
    thread.join(5)
    assert not thread.is_alive()


def test_a_controller_that_dies_is_followed_by_another(server):
    thread, path = server
    connect(path).close()
    with connect(path):
        thread.join(1)
        assert thread.is_alive()


@pytest.mark.parametrize("last", [Leave(), Fork(version="another", gpu=0, main="a:b", spec={})])
def test_told_to_leave_or_of_another_version_it_leaves(server, last):
    thread, path = server
    with connect(path) as connection:
        connection.send(encode(last)[0])
        thread.join(5)
        assert not thread.is_alive()
