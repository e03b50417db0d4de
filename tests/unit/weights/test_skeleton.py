"""Packing keeps every tensor's bytes, shape, strides and sharing, and stores shared bytes once."""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuctld.weights import skeleton
from gpuctld.weights.skeleton import Unpackable

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.bool,
    torch.int64,
    torch.complex64,
]


class Holder(torch.nn.Module):
    """Buffers of any kind, by number."""

    def __init__(self, tensors):
        super().__init__()
        for number, tensor in enumerate(tensors):
            self.register_buffer(str(number), tensor)


def packed(graph):
    plan = skeleton.plan(graph)
    slab = torch.zeros(plan.slab_bytes, dtype=torch.uint8)
    skeleton.copy_runs(plan.runs, slab, lambda _: None)
    return plan, slab, skeleton.assemble(plan.skeleton, plan.entries, slab)


def raw(tensor):
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def assert_same(before, after):
    assert after.dtype == before.dtype
    assert after.shape == before.shape
    assert after.stride() == before.stride()
    assert torch.equal(raw(before), raw(after))


@st.composite
def views(draw):
    """Strided views of one buffer of random bytes, of mixed types: they overlap, or do not."""
    buffer = torch.randint(0, 2, (4096,), dtype=torch.uint8)
    found = []
    for _ in range(draw(st.integers(1, 6))):
        typed = buffer.view(draw(st.sampled_from(DTYPES)))
        start = draw(st.integers(0, typed.numel() // 2))
        rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 5))
        strides = (draw(st.integers(0, 8)), draw(st.integers(0, 8)))
        found.append(typed.as_strided((rows, columns), strides, start))
    return found


@settings(max_examples=150, deadline=None)
@given(views())
def test_any_views_of_one_storage_come_back_as_they_were(tensors):
    _, _, again = packed(Holder(tensors))
    for before, after in zip(tensors, again.buffers(), strict=True):
        assert_same(before, after)


def test_tied_weights_are_stored_once_and_stay_tied():
    layer = torch.nn.Linear(64, 64, bias=False)
    rows = Holder([layer.weight.data[3:5]])
    plan, _, again = packed({"first": layer.weight, "layer": layer, "rows": rows})
    assert plan.slab_bytes == 64 * 64 * 4
    assert again["layer"].weight is again["first"]
    next(again["rows"].buffers()).fill_(7)
    assert (again["first"][3:5] == 7).all()


def test_a_slice_of_a_large_storage_brings_only_its_own_bytes():
    plan, _, _ = packed(Holder([torch.zeros(1_000_000)[5_000:5_128]]))
    assert plan.slab_bytes == 512


def test_a_wide_type_behind_a_narrow_one_stays_aligned():
    buffer = torch.arange(64, dtype=torch.uint8)
    narrow, wide = buffer[3:40], buffer.view(torch.float64)[1:3]
    _, _, again = packed(Holder([narrow, wide]))
    first, second = again.buffers()
    assert_same(narrow, first)
    assert_same(wide, second)


def test_tensors_outside_the_modules_stay_where_to_leaves_them():
    scheduler = types.SimpleNamespace(sigmas=torch.linspace(0, 1, 10))
    plan, slab, again = packed({"scheduler": scheduler, "layer": torch.nn.Linear(2, 2)})
    assert [entry.shape for entry in plan.entries] == [[2, 2], [2]]
    assert torch.equal(again["scheduler"].sigmas, scheduler.sigmas)
    slab.zero_()
    assert torch.equal(again["scheduler"].sigmas, scheduler.sigmas)


def test_parameters_buffers_and_loose_tensors_keep_their_kind():
    module = torch.nn.BatchNorm1d(3).requires_grad_(False)
    module.loose = torch.arange(3)
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    _, _, again = packed(module)
    assert isinstance(again.weight, torch.nn.Parameter)
    assert not again.weight.requires_grad
    assert "scratch" in dict(again.named_buffers())
    assert "scratch" not in again.state_dict()
    assert torch.equal(again.loose, module.loose)


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        (Holder([torch.empty(3, device="meta")]), "on meta"),
        (Holder([torch.eye(3).to_sparse()]), "layout"),
        (Holder([torch.zeros(2, dtype=torch.complex64).conj()]), "conjugated"),
        ([types.SimpleNamespace(run=lambda: 0)], "not picklable"),
        (Holder([torch.zeros(2).as_subclass(type("Quantised", (torch.Tensor,), {}))]), "Quantised"),
    ],
)
def test_what_no_slab_can_hold_is_refused_with_the_reason(graph, why):
    with pytest.raises(Unpackable, match=why):
        skeleton.plan(graph)
