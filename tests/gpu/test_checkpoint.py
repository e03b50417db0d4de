"""Suspending takes the context off the GPU as well; waking brings everything back."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.gpu.conftest import DEVICE

pytestmark = pytest.mark.gpu

MIB = 2**20

WORKER = """
import sys, torch
from gpuctld import weights
from tests.gpu import graphs
from tests.gpu.conftest import DEVICE, silent

_, resident = graphs.attached(graphs.linear(8192), DEVICE, weights.gauge(torch.device("cpu"), ""))
data = torch.ones(8, 8192, device=DEVICE)
expected = resident.pipeline.components["layer"](data)
resident.unload()
resident.release_pins()
print("parked", flush=True)
sys.stdin.readline()
resident.restore_pins()
resident.reload(silent, verify=True)
print(torch.equal(resident.pipeline.components["layer"](data), expected), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def helper():
    process = _python("-m", "gpuctld.checkpoint")
    yield process
    process.stdin.close()
    process.wait(10)


@pytest.fixture
def worker():
    process = _python("-c", WORKER)
    assert process.stdout.readline() == "parked\n"
    yield process
    process.kill()
    process.wait(10)


def _python(*arguments):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], text=True, **pipes)


def ask(process, line):
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline()


def used():
    free, total = torch.cuda.mem_get_info(DEVICE)
    return total - free


def test_a_suspended_worker_leaves_next_to_nothing_on_the_gpu(helper, worker):
    parked = used()
    down = json.loads(ask(helper, f"suspend {worker.pid}"))
    assert down["ok"], down["error"]
    given_back = parked - used()
    up = json.loads(ask(helper, f"wake {worker.pid}"))
    assert up["ok"], up["error"]
    assert given_back > 300 * MIB
    assert ask(worker, "go on") == "True\n"


def test_what_the_driver_refuses_is_said(helper):
    refused = json.loads(ask(helper, f"suspend {os.getpid() + 10_000_000}"))
    assert not refused["ok"]
    assert "cuCheckpointProcessLock" in refused["error"]
