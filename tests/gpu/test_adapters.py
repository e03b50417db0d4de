"""On a GPU: adapters leave with their model, and come back to the same addresses."""

from __future__ import annotations

import os

import pytest
import torch

from gpuctl.errors import OutOfMemory
from gpuctld.weights.slab import CudaSlab
from tests.conftest import silent
from tests.fakes import adapters
from tests.gpu import graphs
from tests.gpu.conftest import DEVICE, LAYER_BYTES, MIB, WIDTH
from tests.gpu.test_weights import picture, used

pytestmark = pytest.mark.gpu


@pytest.fixture
def adapted(layer):
    """A model of one layer with an adapter of the same size."""
    adapter = torch.randn(WIDTH, WIDTH, device=DEVICE)
    graphs.adopt(layer, adapter)
    return layer, adapter


@pytest.fixture
def lora(folder, tmp_path):
    return str(adapters.save(folder, tmp_path / "ink"))


def test_pictures_with_an_adapter_are_bit_equal_over_three_cycles(resident, lora):
    plain = picture(resident)
    resident.add_adapter("ink", lora, 0.7)
    expected = picture(resident)
    assert (expected != plain).any()
    tensors = dict(resident.pipeline.unet.named_parameters())
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for _ in range(3):
        resident.unload()
        resident.reload(silent, verify=True)
        assert (picture(resident) == expected).all()
        assert {name: each.data_ptr() for name, each in tensors.items()} == addresses
    resident.adapters.remove("ink")
    assert (picture(resident) == plain).all()
    resident.unload()
    resident.reload(silent, verify=True)
    assert (picture(resident) == plain).all()


def test_an_adapter_comes_with_a_model_that_was_parked_from_the_start(resident, lora):
    resident.add_adapter("ink", lora, 0.7)
    expected = picture(resident)
    resident.unload()
    resident.adapters.remove("ink")
    resident.adapters.expect("ink", lora, 0.7)
    resident.reload(silent, verify=True)
    assert (picture(resident) == expected).all()


def test_an_unload_gives_the_adapters_memory_back_too(adapted):
    resident, adapter = adapted
    torch.cuda.empty_cache()
    expected, before, address = adapter.cpu(), used(), adapter.data_ptr()
    assert resident.device_bytes == resident.layout.slab_bytes + LAYER_BYTES
    for _ in range(3):
        freed = resident.unload()
        assert before - used() >= 2 * LAYER_BYTES
        assert freed.freed_bytes >= 2 * LAYER_BYTES
        resident.reload(silent, verify=True)
        assert abs(used() - before) <= 2 * MIB
        assert torch.equal(adapter.cpu(), expected)
        assert adapter.data_ptr() == address


def test_an_adapter_that_is_taken_off_leaves_no_memory(gauge):
    descriptor, resident = graphs.attached(graphs.linear(1024), DEVICE, gauge)
    torch.cuda.empty_cache()
    base = used()
    mover = resident._mover.adopt("ink", [torch.randn(WIDTH, WIDTH, device=DEVICE)])
    torch.cuda.empty_cache()
    assert used() - base >= LAYER_BYTES
    mover.close()
    assert abs(used() - base) <= 2 * MIB
    resident.drop()
    os.close(descriptor)


def test_where_the_adapter_does_not_fit_the_model_stays_parked_too(adapted):
    resident, adapter = adapted
    expected = adapter.cpu()
    resident.unload()
    free, _ = torch.cuda.mem_get_info(DEVICE)
    hog = CudaSlab(free - LAYER_BYTES - LAYER_BYTES // 2, DEVICE)
    for _ in hog.map():
        pass
    base = used()
    with pytest.raises(OutOfMemory):
        resident.reload(silent)
    assert used() == base
    assert resident.tier == "host"
    hog.close()
    resident.reload(silent, verify=True)
    assert torch.equal(adapter.cpu(), expected)
