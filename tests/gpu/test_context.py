"""Suspending takes the context off the GPU as well; waking brings everything back."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from gpuctl.errors import SuspendRefused
from gpuctld import weights
from tests.gpu.conftest import DEVICE, MIB

pytestmark = pytest.mark.gpu

WORKER = """
import sys, torch
from gpuctld import weights
from tests.gpu import graphs
from tests.conftest import silent
from tests.gpu.conftest import DEVICE

_, resident = graphs.attached(graphs.linear(8192), DEVICE, weights.gauge(torch.device("cpu"), ""))
adapter = torch.randn(8192, 8192, device=DEVICE)
graphs.adopt(resident, adapter)
copy = adapter.cpu()
context = weights.context(DEVICE)
data = torch.ones(8, 8192, device=DEVICE)
expected = resident.pipeline.components["layer"](data)
resident.unload()
print("parked", flush=True)
sys.stdin.readline()
resident.release_pins()
context.suspend()
print("suspended", flush=True)
sys.stdin.readline()
context.wake()
resident.restore_pins()
resident.reload(silent, verify=True)
same = torch.equal(resident.pipeline.components["layer"](data), expected)
print(same and torch.equal(adapter.cpu(), copy), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def worker():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", WORKER], text=True, **pipes)
    assert process.stdout.readline() == "parked\n"
    yield process
    process.kill()
    process.wait(10)


def go_on(process):
    process.stdin.write("go on\n")
    process.stdin.flush()
    return process.stdout.readline()


def used():
    free, total = torch.cuda.mem_get_info(DEVICE)
    return total - free


def test_a_suspended_process_leaves_next_to_nothing_on_the_gpu(worker):
    before = used()
    assert go_on(worker) == "suspended\n"
    time.sleep(0.1)  # for the driver's books
    assert before - used() > 300 * MIB
    assert go_on(worker) == "True\n", "the same output as before"


def test_what_the_driver_refuses_is_said(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 10_000_000)
    context = weights.context(DEVICE)
    with pytest.raises(SuspendRefused, match="CUDA error"):
        context.suspend()
    assert not context.suspended
    assert torch.ones(3, device=DEVICE).sum().item() == 3
