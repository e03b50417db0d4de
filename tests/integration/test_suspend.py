"""Suspending through the daemon. On CPU devices there is nothing to give back, only the states."""

from __future__ import annotations

import os
import signal

import pytest

from tests.integration.daemon import states, worker_states


@pytest.fixture
def suspended(daemon):
    """The shared daemon with both workers suspended; awake again afterwards."""
    daemon.client().unload(suspend=True)
    yield daemon
    daemon.client().load("shapes")


def test_a_reload_wakes_and_the_pictures_are_the_same(daemon):
    client = daemon.client()
    expected = daemon.draw(0)
    reply = client.unload(suspend=True)
    assert [row["state"] for row in reply["workers"]] == ["parked"] * 2 + ["suspended"] * 2
    assert worker_states(client.status()) == ["suspended"] * 2
    client.reload(verify=True)
    assert worker_states(client.status()) == ["ready"] * 2
    assert daemon.draw(0) == daemon.draw(1) == expected


def test_a_drop_leaves_the_workers_suspended_and_a_load_wakes_them(suspended):
    client = suspended.client()
    client.drop("shapes")
    assert worker_states(client.status()) == ["suspended"] * 2
    client.load("shapes")
    assert worker_states(client.status()) == ["ready"] * 2


def test_people_read_it_as_a_move_of_the_context(daemon):
    daemon.client().load("shapes")
    lines = daemon.cli("unload", "--suspend").stdout.splitlines()
    assert lines[2].startswith("gpu 0  context  device -> host")
    assert lines[2].endswith("ms") or lines[2].endswith(" s")
    assert "suspended" in daemon.cli("status").stdout
    daemon.cli("reload")


def test_a_command_gets_suspended_gpus_and_the_models_come_back(daemon):
    daemon.client().load("shapes")
    expected = daemon.draw(1)
    daemon.cli("run", "--suspend", "--", "true")
    assert states(daemon.client().status()) == ["loaded"] * 2
    assert daemon.draw(1) == expected


def test_a_suspended_worker_that_dies_comes_back_suspended(own_daemon):
    daemon = own_daemon(1)
    client = daemon.client()
    client.load("shapes")
    client.unload(suspend=True)
    victim = client.status()["workers"][0]["pid"]
    assert victim > 0
    os.kill(victim, signal.SIGKILL)
    daemon.wait_for(lambda status: status["workers"][0]["pid"] not in {0, victim})
    daemon.wait_for(lambda status: worker_states(status) == ["suspended"])
    assert states(client.status()) == ["parked"]
    client.reload()
    daemon.draw(0)


def test_a_stop_while_suspended_is_clean_and_the_next_start_suspends_again(own_daemon):
    daemon = own_daemon(1)
    daemon.client().load("shapes")
    daemon.client().unload(suspend=True)
    assert daemon.stop() == 0
    daemon.start()
    daemon.wait_for(lambda status: worker_states(status) == ["suspended"])
    assert states(daemon.client().status()) == ["parked"]
