"""A whole daemon on a GPU: two workers share the one that every machine for these tests has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pynvml
import pytest

from gpuctl.errors import GpuctlError
from tests.gpu.conftest import MIB
from tests.integration.daemon import Daemon, states, worker_states

pytestmark = pytest.mark.gpu

KEEPER = """
import time, torch
free, _ = torch.cuda.mem_get_info()
for spare in range(2, 64, 2):
    try:
        kept = torch.empty(free - spare * 2**20, dtype=torch.uint8, device="cuda")
        break
    except torch.OutOfMemoryError:
        pass
print(kept.nbytes, flush=True)
time.sleep(600)
"""
"""A program that takes all that a card has left, says how much, and keeps it."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    made = Daemon(tmp_path_factory.mktemp("daemon"), device="cuda:0").start()
    made.client().load("shapes")
    yield made
    if made.process.poll() is None:
        made.stop(signal.SIGKILL)


def used():
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used


@pytest.mark.parametrize("fanout", [True, False])
def test_seeded_images_are_equal_over_cycles_and_on_both_workers(daemon, fanout):
    client = daemon.client()
    expected = daemon.draw(0)
    for _ in range(3):
        client.unload()
        client.reload(fanout=fanout, verify=True)
        assert daemon.draw(0) == daemon.draw(1) == expected


def test_suspend_gives_the_contexts_back_and_reload_wakes_them(daemon):
    client = daemon.client()
    expected = daemon.draw(0)
    client.unload()
    parked = used()
    reply = client.unload(suspend=True)
    freed = [row["freed_bytes"] for row in reply["workers"] if not row["model"]]
    assert min(freed) > 300 * MIB
    assert max(row["residual_bytes"] for row in reply["workers"] if not row["model"]) <= 16 * MIB
    assert parked - used() > 600 * MIB
    assert worker_states(client.status()) == ["suspended"] * 2
    client.reload(verify=True)
    assert daemon.draw(0) == daemon.draw(1) == expected


def test_a_drop_while_suspended_leaves_it_suspended(daemon):
    client = daemon.client()
    client.unload(suspend=True)
    base = used()
    client.drop("shapes")
    assert used() <= base + MIB
    assert worker_states(client.status()) == ["suspended"] * 2
    client.load("shapes")
    daemon.draw(1)


def room_without(client):
    """Bytes that are free on the card while the workers are suspended."""
    client.unload(suspend=True)
    pynvml.nvmlInit()
    free = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).free
    client.load("shapes")
    return int(free)


def test_a_command_that_takes_nearly_the_whole_card_gets_it_round_after_round(daemon):
    client = daemon.client()
    client.load("shapes")
    expected = daemon.draw(0)
    need = room_without(client) - 1024 * MIB
    program = f"import torch; torch.empty({need - 1024 * MIB}, dtype=torch.uint8, device='cuda')"
    for _ in range(3):
        words = ["--suspend", "--need", str(need), "--", sys.executable, "-c", program]
        daemon.cli("run", *words)
        assert states(client.status()) == ["loaded"] * 2
        assert daemon.draw(0) == expected


@pytest.fixture
def programs():
    """A list of programs that end with the test, however it ends."""
    made = []
    yield made
    for program in made:
        program.kill()
        program.wait()


def test_a_program_that_keeps_the_card_is_named_and_outlasted(daemon, programs):
    client = daemon.client()
    client.load("shapes")
    expected = daemon.draw(0)
    client.unload()
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER], stdout=subprocess.PIPE)
    programs.append(keeper)
    kept = int(keeper.stdout.readline())
    total = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).total
    assert kept >= 0.9 * total
    with pytest.raises(GpuctlError, match=f"pid {keeper.pid} ") as refused:
        client.reload()
    assert refused.value.code == "device_memory"
    assert states(client.status()) == ["parked"] * 2, "never half of them"
    waiting = daemon.popen("reload", "--wait", "30s", stdout=subprocess.DEVNULL)
    time.sleep(1.0)
    assert waiting.poll() is None
    keeper.kill()
    keeper.wait()
    assert waiting.wait(20) == 0
    assert daemon.draw(0) == daemon.draw(1) == expected


def test_a_worker_killed_while_suspended_comes_back_suspended(daemon):
    client = daemon.client()
    client.unload(suspend=True)
    base = used()
    victim = client.status()["workers"][0]["pid"]
    assert victim > 0
    os.kill(victim, signal.SIGKILL)
    daemon.wait_for(lambda s: s["workers"][0]["pid"] not in {0, victim})
    daemon.wait_for(lambda s: worker_states(s) == ["suspended"] * 2)
    assert states(client.status()) == ["parked"] * 2
    assert used() <= base + 16 * MIB
    client.reload(verify=True)
    daemon.draw(0)


def test_a_killed_daemon_leaves_nothing_on_the_gpu(tmp_path):
    base = used()
    daemon = Daemon(tmp_path, device="cuda:0").start()
    daemon.client().load("shapes")
    daemon.stop(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while used() > base + 64 * MIB:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("woken", [False, True])
def test_a_stop_after_a_suspend_is_prompt_and_leaves_nothing(tmp_path, woken):
    daemon = Daemon(tmp_path, device="cuda:0").start()
    client = daemon.client()
    client.load("shapes")
    client.unload(suspend=True)
    if woken:
        client.reload()
    pids = daemon.worker_pids()
    started = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - started < 5
    held = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    assert not {each.pid for each in held} & set(pids)
