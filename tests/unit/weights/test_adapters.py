"""LoRA adapters move with their model, at the same scale, and leave no trace when they go."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import silent
from tests.fakes import adapters, families

from gpuctl.errors import BadModel, BadRequest, Busy, Corrupt, OutOfMemory
from gpuctld import weights
from gpuctld.weights import ModelSource, movers, skeleton

FAMILY = "StableDiffusion"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and LoRA files for it."""
    home = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    families.stable_diffusion().save_pretrained(home / "model")
    for name in ("ink", "oil"):
        adapters.save(home / "model", home / name)
    return home


@pytest.fixture
def lora(folders):
    return str(folders / "ink" / adapters.FILE)


@pytest.fixture
def oil(folders):
    return str(folders / "oil" / adapters.FILE)


@pytest.fixture
def load(folders, descriptor):
    """Loads the model; all that was loaded is dropped after the test."""
    made = []

    def again():
        source = ModelSource(name="model", path=str(folders / "model"))
        made.append(weights.load(source, descriptor, CPU, weights.gauge(CPU, ""), silent))
        return made[-1]

    yield again
    for each in made:
        each.drop()


@pytest.fixture
def resident(load):
    return load()


def draw(resident):
    return families.render(FAMILY, resident.pipeline)


def lora_bytes(path):
    return sum(tensor.nbytes for tensor in load_file(path).values())


def layers(resident):
    """The adapters' own tensors."""
    unet = resident.pipeline.unet
    return [tensor for name, tensor in unet.named_parameters() if ".lora_" in name]


def test_an_adapter_is_there_after_a_reload_at_the_same_scale(resident, lora):
    plain = draw(resident)
    resident.add_adapter("ink", lora, 0.7)
    expected = draw(resident)
    assert not torch.equal(expected, plain)
    for _ in range(3):
        resident.unload()
        resident.reload(silent, verify=True)
        assert torch.equal(draw(resident), expected)
        assert resident.adapters.list() == [{"name": "ink", "scale": 0.7}]


def test_adding_it_again_changes_the_scale_alone(resident, lora):
    resident.add_adapter("ink", lora, 0.7)
    strong = draw(resident)
    resident.add_adapter("ink", lora, 0.1)
    assert not torch.equal(draw(resident), strong)
    resident.add_adapter("ink", lora, 0.7)
    assert torch.equal(draw(resident), strong)


def test_a_removed_adapter_leaves_the_model_as_it_was(resident, lora):
    plain = draw(resident)
    resident.add_adapter("ink", lora, 0.7)
    resident.adapters.remove("ink")
    assert torch.equal(draw(resident), plain)
    assert resident.adapters.list() == []
    resident.unload()
    resident.reload(silent, verify=True)
    assert torch.equal(draw(resident), plain)


def test_what_is_wrong_with_an_adapter_is_named(resident, lora, tmp_path):
    with pytest.raises(BadModel, match="missing"):
        resident.add_adapter("ink", str(tmp_path / "none.safetensors"), 1.0)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 64)
    with pytest.raises(BadModel, match="damaged"):
        resident.add_adapter("ink", str(damaged), 1.0)
    with pytest.raises(BadRequest, match="ink"):
        resident.adapters.remove("ink")
    assert resident.adapters.list() == []


def test_two_adapters_come_back_bit_by_bit_at_their_scales(resident, lora, oil):
    resident.add_adapter("ink", lora, 0.7)
    one = draw(resident)
    resident.add_adapter("oil", oil, 0.3)
    both = draw(resident)
    assert not torch.equal(both, one)
    expected = [tensor.clone() for tensor in layers(resident)]
    for _ in range(3):
        resident.unload()
        resident.reload(silent, verify=True)
        pairs = zip(layers(resident), expected, strict=True)
        assert all(torch.equal(now, before) for now, before in pairs)
        assert torch.equal(draw(resident), both)
    resident.adapters.remove("oil")
    assert torch.equal(draw(resident), one)


def test_an_unload_takes_the_adapters_memory_from_the_device(resident, lora):
    resident.add_adapter("ink", lora, 0.7)
    assert all(tensor.count_nonzero() for tensor in layers(resident))
    addresses = [tensor.data_ptr() for tensor in layers(resident)]
    resident.unload()
    assert not any(tensor.count_nonzero() for tensor in layers(resident)), "fresh pages are zero"
    resident.reload(silent)
    assert [tensor.data_ptr() for tensor in layers(resident)] == addresses


def test_an_adapter_counts_where_it_is(resident, lora):
    alone = resident.device_bytes
    assert resident.host_bytes == alone
    resident.add_adapter("ink", lora, 0.7)
    assert alone + lora_bytes(lora) <= resident.device_bytes == resident.host_bytes
    resident.unload()
    assert resident.reload(silent).bytes == resident.device_bytes
    resident.adapters.remove("ink")
    assert resident.device_bytes == resident.host_bytes == alone


def test_an_adapter_can_be_taken_off_a_parked_model(resident, lora, oil):
    plain = draw(resident)
    resident.add_adapter("ink", lora, 0.7)
    one = draw(resident)
    resident.add_adapter("oil", oil, 0.3)
    resident.unload()
    resident.adapters.remove("oil")
    resident.reload(silent, verify=True)
    assert torch.equal(draw(resident), one)
    resident.unload()
    resident.adapters.remove("ink")
    resident.reload(silent, verify=True)
    assert torch.equal(draw(resident), plain)


def test_none_is_put_on_a_parked_model(resident, lora):
    plain = draw(resident)
    resident.unload()
    with pytest.raises(Busy, match="device"):
        resident.add_adapter("ink", lora, 0.7)
    assert resident.adapters.list() == []
    resident.reload(silent)
    assert torch.equal(draw(resident), plain)


def test_one_that_is_expected_comes_with_the_model(resident, descriptor, lora, tmp_path):
    resident.add_adapter("ink", lora, 0.7)
    expected = draw(resident)
    gauge = weights.gauge(CPU, "")
    other = weights.attach_parked(resident.layout, descriptor, CPU, gauge)
    other.adapters.expect("ink", lora, 0.7)
    assert other.adapters.list() == resident.adapters.list()
    other.reload(silent, verify=True)
    assert torch.equal(draw(other), expected)
    other.unload()
    other.adapters.expect("gone", str(tmp_path / "gone"), 1.0)
    with pytest.raises(BadModel, match="gone is missing"):
        other.reload(silent)
    assert not any(tensor.count_nonzero() for tensor in layers(other)), "all of it is parked"
    other.adapters.remove("gone")
    other.reload(silent, verify=True)
    assert torch.equal(draw(other), expected)
    other.drop()


def test_a_reload_that_fails_half_way_leaves_everything_parked(resident, lora, oil, monkeypatch):
    resident.add_adapter("ink", lora, 0.7)
    resident.add_adapter("oil", oil, 0.3)
    expected = draw(resident)
    resident.unload()

    def full(*_, **__):
        raise OutOfMemory("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(resident.adapters._held["oil"].mover, "bring", full)
        with pytest.raises(OutOfMemory):
            resident.reload(silent)
    assert resident.tier == "host"
    every = [*resident.pipeline.unet.parameters(), *resident.pipeline.text_encoder.parameters()]
    assert not any(tensor.count_nonzero() for tensor in every)
    resident.reload(silent, verify=True)
    assert torch.equal(draw(resident), expected)


def test_verify_finds_a_wrong_byte_of_an_adapter(resident, lora):
    resident.add_adapter("ink", lora, 0.7)
    resident.unload()
    source = resident.adapters._held["ink"].mover._source
    source[17] ^= 1
    with pytest.raises(Corrupt, match="ink"):
        resident.reload(silent, verify=True)
    assert resident.tier == "host"
    source[17] ^= 1
    resident.reload(silent, verify=True)


def test_a_file_for_another_model_leaves_no_trace(resident, lora, oil, tmp_path):
    resident.add_adapter("oil", oil, 0.3)
    expected = draw(resident)
    right = load_file(lora)
    strange = tmp_path / "strange.safetensors"
    save_file({f"strange.{name}": tensor for name, tensor in right.items()}, strange)
    wider = tmp_path / "wider.safetensors"
    twice = {name: torch.cat([each, each], dim=1) for name, each in right.items()}
    save_file(twice, wider)
    for file in (strange, wider):
        with pytest.raises(BadModel, match=file.stem):
            resident.add_adapter("ink", str(file), 1.0)
        assert resident.adapters.list() == [{"name": "oil", "scale": 0.3}]
        assert torch.equal(draw(resident), expected)
    resident.add_adapter("ink", lora, 0.7)
    assert not torch.equal(draw(resident), expected)


def test_the_memory_of_one_that_does_not_fit_is_given_back(resident, lora, monkeypatch):
    plain = draw(resident)

    def full(*_):
        raise OutOfMemory("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(movers.slab, "for_device", full)
        with pytest.raises(OutOfMemory):
            resident.add_adapter("ink", lora, 0.7)
    assert torch.equal(draw(resident), plain)
    resident.add_adapter("ink", lora, 0.7)


def test_pins_are_released_and_restored_with_the_models(resident, lora, monkeypatch):
    resident.add_adapter("ink", lora, 0.7)
    seen = []
    for each in (resident._mover, resident.adapters._held["ink"].mover):
        for verb in ("pause", "resume"):
            monkeypatch.setattr(each._transfer, verb, lambda verb=verb: seen.append(verb))
    resident.release_pins()
    assert seen == ["pause"] * 2
    resident.restore_pins()
    assert seen == ["pause"] * 2 + ["resume"] * 2


def test_a_model_that_moves_by_to_carries_its_adapters(load, lora, monkeypatch):
    plain = draw(load())

    def unpackable(_):
        raise skeleton.Unpackable("a test")

    monkeypatch.setattr(skeleton, "plan", unpackable)
    resident = load()
    alone = resident.device_bytes
    resident.add_adapter("ink", lora, 0.7)
    assert resident.moves_by == "module"
    assert resident.device_bytes >= alone + lora_bytes(lora)
    expected = draw(resident)
    assert not torch.equal(expected, plain)
    resident.unload()
    resident.reload(silent)
    assert torch.equal(draw(resident), expected)
    resident.adapters.remove("ink")
    assert torch.equal(draw(resident), plain)


@pytest.fixture
def flux(tmp_path, descriptor):
    """FLUX, and the weights of a LoRA for it."""
    torch.manual_seed(0)
    families.FAMILIES["Flux"].build().save_pretrained(tmp_path / "flux")
    source = ModelSource(name="flux", path=str(tmp_path / "flux"))
    made = weights.load(source, descriptor, CPU, weights.gauge(CPU, ""), silent)
    file = adapters.save(tmp_path / "flux", tmp_path / "ink")
    yield made, load_file(file)
    made.drop()


@pytest.mark.parametrize("kind", ["norm", "wider"])
def test_one_that_would_change_the_model_itself_is_refused(flux, kind, tmp_path):
    resident, tensors = flux
    plain = families.render("Flux", resident.pipeline)
    file = tmp_path / f"{kind}.safetensors"
    save_file({**tensors, **CHANGES[kind](resident.pipeline.transformer)}, file)
    with pytest.raises(BadModel, match="never fused"):
        resident.add_adapter("control", str(file), 1.0)
    assert resident.adapters.list() == []
    for _ in range(2):
        assert torch.equal(families.render("Flux", resident.pipeline), plain)
        resident.unload()
        resident.reload(silent, verify=True)
    right = tmp_path / "right.safetensors"
    save_file(tensors, right)
    resident.add_adapter("ink", str(right), 1.0)
    assert not torch.equal(families.render("Flux", resident.pipeline), plain)


def norm(transformer):
    """As FLUX's depth and canny adapters have them: these go right into the model."""
    key = "transformer_blocks.0.attn.norm_q.weight"
    return {f"transformer.{key}": transformer.state_dict()[key] + 1}


def wider(transformer):
    """A layer that takes twice as many channels as the model's."""
    into, out = transformer.x_embedder.in_features, transformer.x_embedder.out_features
    name = "transformer.x_embedder.lora_{}.weight"
    return {name.format("A"): torch.ones(4, 2 * into), name.format("B"): torch.ones(out, 4)}


CHANGES = {"norm": norm, "wider": wider}
