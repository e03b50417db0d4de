import os
import socket
import time

import pytest

from gpuctld.service_manager import Notifier


@pytest.fixture
def manager(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


@pytest.mark.parametrize(
    ("call", "sent"),
    [
        (Notifier.ready, "READY=1"),
        (Notifier.stopping, "STOPPING=1"),
        (Notifier.watchdog, "WATCHDOG=1"),
        (lambda n: n.status("loading flux on gpu 2, 61 %"), "STATUS=loading flux on gpu 2, 61 %"),
        (lambda n: n.status("a\nREADY=1"), "STATUS=a READY=1"),
    ],
)
def test_each_state_is_one_datagram(manager, call, sent):
    call(Notifier.from_environment())
    assert manager.recv(4096).decode() == sent


def test_reloading_carries_the_monotonic_clock(manager):
    before = time.monotonic_ns() // 1000
    Notifier.from_environment().reloading()
    state, stamp = manager.recv(4096).decode().splitlines()
    assert state == "RELOADING=1"
    assert before <= int(stamp.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_an_abstract_socket_is_reached(monkeypatch):
    name = f"gpuctl-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name)
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        Notifier.from_environment().ready()
        assert listener.recv(64) == b"READY=1"


def test_the_variables_do_not_reach_children(manager, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert Notifier.from_environment().watchdog_interval_s == 30.0
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)


def test_a_watchdog_for_another_process_is_not_ours(manager, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert Notifier.from_environment().watchdog_interval_s is None


def test_silent_outside_a_service_manager(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier.from_environment()
    assert notifier == Notifier(None, None)
    notifier.ready()


def test_a_full_or_absent_manager_never_blocks(manager, tmp_path):
    notifier = Notifier.from_environment()
    began = time.monotonic()
    for _ in range(2000):
        notifier.watchdog()
    Notifier(str(tmp_path / "nobody")).ready()
    assert time.monotonic() - began < 5
