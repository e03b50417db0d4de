"""Workers in processes of their own reload one model together; one GPU is enough to try it."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch

from gpuctld import weights
from gpuctld.weights.rendezvous import Listener, Meeting
from tests.conftest import silent
from tests.gpu import graphs
from tests.gpu.conftest import DEVICE, WIDTH

pytestmark = pytest.mark.gpu


def worker(rank, paths, layout, channel, dies):
    """Attach parked, reload with the others when told to, and tell what came of it."""
    gpu = rank % torch.cuda.device_count()
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    _, (descriptor,), _, _ = socket.recv_fds(channel, 16, 1)
    resident = weights.attach_parked(
        layout, descriptor, DEVICE, weights.gauge(torch.device("cpu"), "")
    )
    meeting = Meeting(token="t", rank=rank, paths=paths, listener=Listener(paths[rank]))
    channel.send(b"ready")
    channel.recv(2)
    progress = (lambda *_: os._exit(1)) if dies else silent
    reloaded = resident.reload(progress, verify=True, meeting=meeting)
    channel.send(reloaded.path.encode())
    channel.recv(2)


def reload_together(tmp_path, ranks, dying=()):
    """The way that each surviving rank's bytes took; all of them were verified."""
    paths = [str(tmp_path / f"peer-{rank}") for rank in range(max(ranks) + 1)]
    descriptor, layout = graphs.packed(graphs.linear(WIDTH))
    context = multiprocessing.get_context("spawn")
    channels, processes = {}, []
    for rank in ranks:
        channels[rank], theirs = socket.socketpair()
        arguments = (rank, paths, layout, theirs, rank in dying)
        processes.append(context.Process(target=worker, args=arguments))
        processes[-1].start()
        theirs.close()
        socket.send_fds(channels[rank], [b"copy"], [descriptor])
    for channel in channels.values():
        assert channel.recv(16) == b"ready"
    for channel in channels.values():
        channel.send(b"go")
    took = {rank: channels[rank].recv(16).decode() for rank in ranks if rank not in dying}
    for rank in took:
        channels[rank].send(b"ok")
    for process in processes:
        process.join(30)
    os.close(descriptor)
    return took


def test_two_workers_share_the_work(tmp_path):
    assert reload_together(tmp_path, [0, 1]) == {0: "fanout", 1: "fanout"}


def test_a_peer_that_never_comes_is_done_without(tmp_path):
    assert reload_together(tmp_path, [1]).keys() == {1}


def test_a_peer_that_dies_half_way_is_done_without(tmp_path):
    took = reload_together(tmp_path, [0, 1], dying=[0])
    assert took[1] in {"pinned", "staged"}
