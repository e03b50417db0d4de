from __future__ import annotations

import os

import pytest
import torch

from gpuctld import weights
from gpuctld.weights import ModelSource
from tests.conftest import silent
from tests.fakes.tiny_models import tiny_stable_diffusion
from tests.gpu import graphs

DEVICE = torch.device("cuda:0")
MIB = 2**20
WIDTH = 8192
LAYER_BYTES = WIDTH * WIDTH * 4
"""Of a layer so large that what is left of it can be told from what a context takes."""


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def gauge():
    uuid = f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"
    return weights.gauge(DEVICE, uuid)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return tiny_stable_diffusion(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def layer(gauge):
    descriptor, resident = graphs.attached(graphs.linear(WIDTH), DEVICE, gauge)
    yield resident
    resident.drop()
    os.close(descriptor)


@pytest.fixture
def resident(folder, descriptor, gauge):
    source = ModelSource(name="tiny", path=str(folder))
    made = weights.load(source, descriptor, DEVICE, gauge, silent)
    yield made
    made.drop()
