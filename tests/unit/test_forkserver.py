"""When the fork server of the service leaves, and when it waits for the next controller."""

import os
import signal
import socket
import threading
import time

import pytest

import gpuctl
from gpuctld.messages import Ended, Fork, Forked, Leave, decode, encode
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


def linger(spec, channel):
    """A worker that has closed everything, and that the driver does not let go."""
    os.closerange(3, 1024)
    time.sleep(60)


def ask(connection, gpu):
    """Ask for a worker that lingers."""
    spec = {
        "device": {"gpu": gpu, "name": "cpu", "kind": "cpu"},
        "endpoint": "",
        "peer_paths": [],
        "max_pixels": 1,
        "threads": None,
    }
    main = f"{__name__}:{linger.__name__}"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        request = Fork(version=gpuctl.__version__, gpu=gpu, main=main, spec=spec)
        socket.send_fds(connection, [encode(request)[0]], [theirs.fileno()])


def hear(connection):
    """The next news of a worker."""
    packet, descriptors, _, _ = socket.recv_fds(connection, 65_536, 1)
    for descriptor in descriptors:
        os.close(descriptor)
    return decode([packet])[0]


def test_a_process_that_ends_late_holds_up_nobody(server):
    _, path = server
    with connect(path) as connection:
        connection.settimeout(20)
        ask(connection, 0)
        first = hear(connection)
        time.sleep(0.5)  # until it has closed its end of every pipe
        ask(connection, 1)
        second = hear(connection)
        assert isinstance(second, Forked)
        assert second.gpu == 1
        os.kill(first.pid, signal.SIGKILL)
        assert hear(connection) == Ended(gpu=0, status=-signal.SIGKILL)
