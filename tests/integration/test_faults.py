"""Workers that fail, die, stop and are slow: rows, exit codes, and the truth afterwards."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from gpuctl import GpuctlError
from gpuctl.errors import GpuFault, Partial, WorkerLost
from gpuctld.fleet.workers import MAX_FAULTS
from tests.integration.daemon import FAULTY, Daemon, states, worker_states

PROMPT = "a small green star on a white background"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, fork_servers):
    home = tmp_path_factory.mktemp("faulty")
    daemon = Daemon(home, 2, module=FAULTY, fork_servers=fork_servers).start()
    yield daemon
    daemon.inject()
    assert daemon.stop() == 0


@pytest.fixture
def loaded(faulty):
    faulty.inject()
    faulty.client().load("shapes")
    return faulty


@pytest.mark.parametrize(
    ("command", "words", "before", "after"),
    [
        ("LoadModel", ["load", "shapes", "--parallel"], "drop", ["loaded", "absent"]),
        ("UnloadModel", ["unload"], "load", ["parked", "loaded"]),
        ("ReloadModel", ["reload"], "unload", ["loaded", "parked"]),
    ],
)
def test_one_worker_fails_and_the_others_rows_are_right(loaded, command, words, before, after):
    getattr(loaded.client(), before)("shapes")
    loaded.inject({"command": command, "gpu": 1, "raise": "no luck"})
    done = loaded.cli(*words, "--json", check=4)
    reply = json.loads(done.stdout)
    assert not reply["ok"]
    assert reply["error"]["code"] == Partial.code
    assert [row["error"] is None for row in reply["workers"]] == [True, False]
    assert "no luck" in reply["workers"][1]["error"]["message"]
    assert loaded.states() == after


def test_a_worker_that_dies_in_a_job_is_told_once_and_comes_back_loaded(loaded):
    loaded.inject({"command": "RunJob", "gpu": 0, "die": True})
    with pytest.raises(WorkerLost, match="SIGKILL"):
        loaded.client().generate("shapes", PROMPT, options={"gpu": 0})
    loaded.inject()
    status = loaded.wait_for(lambda s: states(s) == ["loaded", "loaded"])
    assert status["workers"][0]["restarts"] >= 1


def test_unload_frees_the_gpu_of_a_worker_that_dies_under_it(loaded):
    loaded.inject({"command": "UnloadModel", "gpu": 1, "die": True})
    assert loaded.client().unload()["ok"]
    loaded.inject()
    loaded.wait_for(lambda s: states(s) == ["parked", "parked"])


def test_killed_workers_come_back_parked_if_they_were_parked(loaded):
    loaded.client().unload()
    for pid in loaded.worker_pids():
        os.kill(pid, signal.SIGKILL)
    loaded.wait_for(lambda s: all(w["restarts"] for w in s["workers"]))
    loaded.wait_for(lambda s: states(s) == ["parked", "parked"])
    loaded.client().reload()


def test_a_broadcast_takes_as_long_as_the_slowest_worker(loaded):
    loaded.inject({"command": "UnloadModel", "delay_s": 0.4})
    started = time.monotonic()
    loaded.client().unload()
    assert 0.4 <= time.monotonic() - started < 0.75


def test_a_client_gives_up_and_the_daemon_still_does_it(loaded):
    loaded.inject({"command": "UnloadModel", "delay_s": 1.0})
    with pytest.raises(GpuctlError) as raised:
        loaded.client(timeout=0.3).unload()
    assert raised.value.code == "timeout"
    loaded.wait_for(lambda s: states(s) == ["parked", "parked"])


@pytest.mark.timeout(90)
def test_killing_the_daemon_leaves_no_worker_and_the_next_one_restores_the_models(own_daemon):
    daemon = own_daemon(2, fork_servers=None)
    client = daemon.client()
    client.load("shapes")
    client.unload(gpus=[1])
    pids = daemon.worker_pids()
    daemon.stop(signal.SIGKILL)
    deadline = time.monotonic() + 2
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_runs(pid) for pid in pids)
    daemon.start()
    daemon.wait_for(lambda s: states(s) == ["loaded", "parked"])
    assert client.ping()["ok"]
    assert daemon.stop() == 0
    assert not list(daemon.home.glob("*.sock"))


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_device_whose_faults_do_not_end_is_quarantined_and_the_other_goes_on(own_daemon):
    daemon = own_daemon(2, module=FAULTY)
    client = daemon.client()
    client.load("shapes")
    sticky = {"command": "RunJob", "gpu": 1, "raise": "CUDA error: an illegal memory access"}
    daemon.inject(sticky)
    for _ in range(MAX_FAULTS):
        with pytest.raises(GpuFault):
            client.generate("shapes", PROMPT, options={"gpu": 1, "on_parked": "wait"})
    status = daemon.wait_for(lambda s: worker_states(s) == ["ready", "quarantined"])
    assert "illegal memory access" in status["workers"][1]["reason"]
    assert "quarantined" in daemon.cli("status").stdout
    assert client.generate("shapes", PROMPT)[0].width == 64
    with pytest.raises(WorkerLost, match="quarantined"):
        client.generate("shapes", PROMPT, options={"gpu": 1, "on_parked": "wait"})
    daemon.cli("reload", check=4)
    assert worker_states(client.status()) == ["ready", "quarantined"]
