"""On a GPU: the same pictures after every cycle, the same addresses, and the memory really gone."""

from __future__ import annotations

import mmap
import os

import pytest
import torch

from gpuctl.errors import Corrupt, OutOfMemory
from gpuctld import weights
from gpuctld.weights.slab import CudaSlab
from tests.conftest import silent
from tests.gpu import graphs
from tests.gpu.conftest import DEVICE, LAYER_BYTES, MIB, WIDTH

pytestmark = pytest.mark.gpu


def used():
    free, total = torch.cuda.mem_get_info(DEVICE)
    return total - free


def picture(resident):
    generator = torch.Generator("cpu").manual_seed(7)
    return resident.pipeline(
        "a", generator=generator, num_inference_steps=2, output_type="np"
    ).images


def test_pictures_are_bit_equal_over_three_cycles(resident):
    assert resident.moves_by == "slab"
    assert resident.pipeline.device.type == "cuda"
    first = picture(resident)
    for _ in range(3):
        resident.unload()
        resident.reload(silent, verify=True)
        assert (picture(resident) == first).all()


def test_a_second_worker_draws_the_same_without_the_files(resident, descriptor, gauge):
    other = weights.attach(resident.layout, descriptor, DEVICE, gauge, silent)
    assert (picture(other) == picture(resident)).all()
    other.drop()


def test_an_unload_gives_the_memory_back_and_says_how_much(layer):
    before = used()
    freed = layer.unload()
    assert before - used() >= LAYER_BYTES
    assert freed.freed_bytes >= LAYER_BYTES
    assert freed.residual_bytes < 2000 * MIB


def test_addresses_never_change(layer):
    address = layer.pipeline.components["layer"].weight.data_ptr()
    for _ in range(3):
        layer.unload()
        layer.reload(silent)
        assert layer.pipeline.components["layer"].weight.data_ptr() == address


def test_twenty_cycles_leave_device_memory_flat(layer):
    layer.unload()
    base = used()
    for _ in range(20):
        layer.reload(silent)
        layer.unload()
    assert abs(used() - base) <= 2 * MIB


def test_what_is_pinned_is_copied_directly(layer):
    layer._mover._transfer._pins.wait()
    assert layer._mover._transfer._pins.trouble == ""
    layer.unload()
    assert layer.reload(silent).path == "pinned"
    layer.unload()
    layer.release_pins()
    layer._mover._transfer._pins.start = lambda: None
    reloaded = layer.reload(silent, verify=True)
    assert reloaded.path == "staged"


def test_progress_ends_with_all_bytes(layer):
    layer.unload()
    seen = []
    layer.reload(lambda done, total: seen.append((done, total)))
    size = layer.layout.slab_bytes
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)


def test_a_captured_graph_replays_after_a_cycle(layer):
    module = layer.pipeline.components["layer"]
    data = torch.randn(64, WIDTH, device=DEVICE)
    module(data)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = module(data)
    graph.replay()
    expected = result.clone()
    del module
    layer.unload()
    layer.reload(silent)
    result.zero_()
    graph.replay()
    assert torch.equal(result, expected)


def test_compiled_code_needs_no_second_compilation(layer):
    module = layer.pipeline.components["layer"]
    compiled = torch.compile(module, mode="reduce-overhead")
    data = torch.randn(64, WIDTH, device=DEVICE)
    with torch.no_grad():
        for _ in range(3):
            expected = compiled(data).clone()
        compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        layer.unload()
        layer.reload(silent)
        assert torch.equal(compiled(data), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations


def test_verify_finds_one_wrong_byte_and_leaves_the_model_parked(gauge):
    descriptor, resident = graphs.attached(graphs.linear(1024), DEVICE, gauge)
    resident.unload()
    base = used()
    with mmap.mmap(descriptor, 0) as host:
        host[12345] ^= 1
        with pytest.raises(Corrupt):
            resident.reload(silent, verify=True)
        assert resident.tier == "host"
        assert used() == base
        host[12345] ^= 1
    resident.reload(silent, verify=True)
    resident.drop()
    os.close(descriptor)


def test_a_reload_that_does_not_fit_leaves_nothing_behind(layer):
    layer.unload()
    free, _ = torch.cuda.mem_get_info(DEVICE)
    hog = CudaSlab(free - LAYER_BYTES // 2, DEVICE)
    for _ in hog.map():
        pass
    base = used()
    with pytest.raises(OutOfMemory):
        layer.reload(silent)
    assert used() == base
    assert layer.tier == "host"
    hog.close()
    assert layer.reload(silent, verify=True).path in {"pinned", "staged"}


def test_parked_from_the_start_takes_no_device_memory(gauge):
    descriptor, layout = graphs.packed(graphs.linear(WIDTH))
    base = used()
    resident = weights.attach_parked(layout, descriptor, DEVICE, gauge)
    assert used() - base <= 2 * MIB
    resident.reload(silent, verify=True)
    resident.drop()
    os.close(descriptor)
