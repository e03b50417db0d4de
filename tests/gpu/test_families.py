"""Any diffusers pipeline on a GPU: the same picture before and after, and in a second worker."""

from __future__ import annotations

import pytest
import torch

from gpuctld import weights
from gpuctld.weights import ModelSource
from tests.conftest import silent
from tests.fakes import families
from tests.gpu.conftest import DEVICE

pytestmark = pytest.mark.gpu

CYCLES = 3


@pytest.mark.parametrize("name", families.FAMILIES)
def test_pictures_are_bit_equal_over_three_cycles_and_between_workers(
    name, tmp_path, descriptor, gauge
):
    torch.manual_seed(0)
    families.FAMILIES[name].build().save_pretrained(tmp_path)
    source = ModelSource(name=name, path=str(tmp_path), dtype="bfloat16")
    resident = weights.load(source, descriptor, DEVICE, gauge, silent)
    expected = families.render(name, resident.pipeline)
    assert torch.device(resident.pipeline.device) == DEVICE
    assert resident.moves_by == "slab", resident.moves_by_reason
    for _ in range(CYCLES):
        resident.unload()
        resident.reload(silent, verify=True)
        assert torch.equal(families.render(name, resident.pipeline), expected)
    other = weights.attach(resident.layout, descriptor, DEVICE, gauge, silent)
    assert torch.equal(families.render(name, other.pipeline), expected)
    other.drop()
    resident.drop()
