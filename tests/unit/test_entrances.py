from __future__ import annotations

import contextlib
import resource
import socket
import time

import pytest
import zmq

from gpuctl.errors import BadConfig
from gpuctld import entrances
from gpuctld.doors import Door


@pytest.fixture
def door(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 4_096:
        pytest.skip("needs 4,096 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4_096, before[1]))
    with zmq.Context() as context:
        made = Door(context, f"ipc://{tmp_path}/door.sock")
        yield made
        made.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def connect_until_nobody_accepts(path: str, held: contextlib.ExitStack) -> int:
    """How many connections were made before there was no progress for half a second."""
    made, progress = 0, time.monotonic()
    while time.monotonic() - progress < 0.5:
        each = held.enter_context(socket.socket(socket.AF_UNIX))
        each.setblocking(False)
        try:
            each.connect(path)
        except BlockingIOError:
            each.close()
            time.sleep(0.01)
        else:
            made, progress = made + 1, time.monotonic()
    return made


def test_libzmq_waits_while_nobody_counts(door, tmp_path):
    before = entrances.open_descriptors()
    with contextlib.ExitStack() as held:
        made = connect_until_nobody_accepts(str(tmp_path / "door.sock"), held)
        accepted = entrances.open_descriptors() - before - made
        assert 900 < accepted <= 1_100
        list(door.receive())
        assert door.problem is not None
    deadline = time.monotonic() + 5
    while entrances.open_descriptors() > before and time.monotonic() < deadline:
        time.sleep(0.01)
        list(door.receive())
    assert door.problem is None
    assert entrances.open_descriptors() <= before


def test_a_shut_entrance_refuses_and_an_open_one_does_not(door, tmp_path):
    path = str(tmp_path / "door.sock")
    [entrance] = door._entrances
    entrance.shut()
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(path)
    for _ in range(2):
        assert entrance.open()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)


def test_nothing_is_left_of_a_closed_door(tmp_path):
    with zmq.Context() as context:
        Door(context, f"ipc://{tmp_path}/door.sock").close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("endpoint", [f"ipc:///tmp/{'x' * 120}.sock", "tcp://127.0.0.1:1"])
def test_an_endpoint_that_cannot_be_bound_is_named(endpoint):
    with zmq.Context() as context, pytest.raises(BadConfig, match=endpoint.split("//")[1]):
        Door(context, endpoint)
