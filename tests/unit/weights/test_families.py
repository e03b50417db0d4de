"""Any diffusers pipeline: the same picture before and after, here and in every other worker."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch
from tests.conftest import silent
from tests.fakes import families

from gpuctld import weights
from gpuctld.weights import ModelSource

CPU = torch.device("cpu")
CYCLES = 3


@pytest.fixture(autouse=True)
def _one_thread():
    """A child that is forked from a process with OpenMP's pool of threads would wait for them."""
    torch.set_num_threads(1)


@pytest.fixture(params=families.FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def source(name, tmp_path):
    torch.manual_seed(0)
    families.FAMILIES[name].build().save_pretrained(tmp_path)
    return ModelSource(name=name, path=str(tmp_path))


@pytest.fixture
def gauge():
    return weights.gauge(CPU, "")


@pytest.fixture
def resident(source, descriptor, gauge):
    made = weights.load(source, descriptor, CPU, gauge, silent)
    yield made
    made.drop()


def test_pictures_are_bit_equal_after_three_cycles(name, resident):
    expected = families.render(name, resident.pipeline)
    assert expected.std() > 0.01, "a picture of something"
    assert resident.moves_by == "slab", resident.moves_by_reason
    for _ in range(CYCLES):
        resident.unload()
        resident.reload(silent, verify=True)
        assert torch.equal(families.render(name, resident.pipeline), expected)


def test_nothing_of_the_weights_stays_outside_the_slab(name, resident):
    before = _checksum(resident.pipeline)
    resident.unload()
    assert before != 0
    assert _checksum(resident.pipeline) == 0, "an unmapped slab of a CPU reads as zeros"


def _checksum(pipeline):
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    tensors = [each for module in modules for each in (*module.parameters(), *module.buffers())]
    return sum(int(each.detach().reshape(-1).view(torch.uint8).sum()) for each in tensors)


def test_another_worker_draws_the_same_from_the_host_copy(name, resident, descriptor):
    expected = families.render(name, resident.pipeline)
    here, there = multiprocessing.Pipe()
    pid = os.fork()
    if pid == 0:
        _attach_and_draw(name, resident.layout, descriptor, there)
    there.close()
    try:
        assert here.poll(60), "the other worker says nothing"
        assert torch.equal(torch.tensor(here.recv()), expected)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _attach_and_draw(name, layout, descriptor, answer):
    """The other worker: it has the host copy and its layout, and nothing of the pipeline."""
    try:
        made = weights.attach(layout, descriptor, CPU, weights.gauge(CPU, ""), silent)
        answer.send(families.render(name, made.pipeline).tolist())
    except Exception as error:  # noqa: BLE001  the parent compares it with a picture
        answer.send(repr(error))
    finally:
        os._exit(0)
