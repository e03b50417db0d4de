"""A packed object graph of a chosen size, for tests that need weights but no pipeline."""

from __future__ import annotations

import os

import torch

from gpuctld import weights
from gpuctld.weights import Layout, adapters, checksum, skeleton
from gpuctld.weights.segment import Segment, pack_table


class Graph:
    """What a resident needs of a pipeline."""

    def __init__(self, **modules):
        self.components = modules


def packed(graph):
    """A file with the packed graph, and its layout."""
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    plan = skeleton.plan(graph)
    table = pack_table(plan.entries)
    segment = Segment.create(descriptor, plan.slab_bytes, plan.skeleton, table)
    skeleton.copy_runs(plan.runs, segment.slab, lambda _: None)
    layout = Layout(
        model="graph",
        pipeline="Graph",
        dtype="float32",
        slab_bytes=plan.slab_bytes,
        skeleton_bytes=len(plan.skeleton),
        checksums=checksum.of(segment.slab),
    )
    return descriptor, layout


def linear(width, seed=0):
    """A graph with one square layer of ``width`` x ``width`` float32 weights."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(width, width).requires_grad_(False)
    return Graph(layer=layer)


def attached(graph, device, gauge):
    """A graph on the device; the caller closes the descriptor."""
    descriptor, layout = packed(graph)
    return descriptor, weights.attach(layout, descriptor, device, gauge, lambda *_: None)


def adopt(resident, tensor):
    """Have a tensor on the device move with the graph, as an adapter's tensors do."""
    mover = resident._mover.adopt("ink", [tensor])
    resident.adapters._held["ink"] = adapters._Adapter("", 1.0, mover)
