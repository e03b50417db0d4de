"""LoRA adapters move with their model, at the same scale, and leave no trace when they go."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tests.conftest import silent
from tests.fakes import families

from gpuctl.errors import BadModel, BadRequest
from gpuctld import weights
from gpuctld.weights import ModelSource

FAMILY = "StableDiffusion"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and a LoRA file for it."""
    home = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    pipeline = families.stable_diffusion()
    pipeline.save_pretrained(home / "model")
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    layers = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(home / "ink", unet_lora_layers=layers)
    return home


@pytest.fixture
def lora(folders):
    return str(folders / "ink" / "pytorch_lora_weights.safetensors")


@pytest.fixture
def resident(folders, descriptor):
    source = ModelSource(name="model", path=str(folders / "model"))
    made = weights.load(source, descriptor, CPU, weights.gauge(CPU, ""), silent)
    yield made
    made.drop()


def draw(resident):
    return families.render(FAMILY, resident.pipeline)


def test_an_adapter_is_there_after_a_reload_at_the_same_scale(resident, lora):
    plain = draw(resident)
    resident.adapters.add("ink", lora, 0.7)
    expected = draw(resident)
    assert not torch.equal(expected, plain)
    for _ in range(3):
        resident.unload()
        resident.reload(silent, verify=True)
        assert torch.equal(draw(resident), expected)
        assert resident.adapters.list() == [{"name": "ink", "scale": 0.7}]


def test_adding_it_again_changes_the_scale_alone(resident, lora):
    resident.adapters.add("ink", lora, 0.7)
    strong = draw(resident)
    resident.adapters.add("ink", lora, 0.1)
    assert not torch.equal(draw(resident), strong)
    resident.adapters.add("ink", lora, 0.7)
    assert torch.equal(draw(resident), strong)


def test_a_removed_adapter_leaves_the_model_as_it_was(resident, lora):
    plain = draw(resident)
    resident.adapters.add("ink", lora, 0.7)
    resident.adapters.remove("ink")
    assert torch.equal(draw(resident), plain)
    assert resident.adapters.list() == []
    resident.unload()
    resident.reload(silent, verify=True)
    assert torch.equal(draw(resident), plain)


def test_what_is_wrong_with_an_adapter_is_named(resident, lora, tmp_path):
    with pytest.raises(BadModel, match="missing"):
        resident.adapters.add("ink", str(tmp_path / "none.safetensors"), 1.0)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 64)
    with pytest.raises(BadModel, match="damaged"):
        resident.adapters.add("ink", str(damaged), 1.0)
    with pytest.raises(BadRequest, match="ink"):
        resident.adapters.remove("ink")
    assert resident.adapters.list() == []
