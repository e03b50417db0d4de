"""Workers find each other, hand over descriptors, and go on alone when a peer does not come."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from gpuctld.weights import rendezvous
from gpuctld.weights.rendezvous import Listener, Meeting


@pytest.fixture
def paths(tmp_path):
    return [str(tmp_path / f"peer-{rank}") for rank in range(3)]


def run_together(ranks, paths, tokens, patience_s=5.0):
    """What each rank met, and what it read from the descriptors that it was shown."""
    listeners = {rank: Listener(paths[rank]) for rank in ranks}
    found = {}

    def work(rank):
        memory = [(_file(f"memory of {rank}"), 100 + rank)]
        meeting = Meeting(token=tokens[rank], rank=rank, paths=paths, listener=listeners[rank])
        links = rendezvous.meet(meeting, memory, patience_s)
        os.close(memory[0][0])
        found[rank] = {link.rank: _contents(link) for link in links}
        for link in links:
            link.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for listener in listeners.values():
        listener.close()
    return found


def _file(text):
    descriptor = os.memfd_create("test")
    os.pwrite(descriptor, text.encode(), 0)
    return descriptor


def _contents(link):
    return [(os.pread(descriptor, 100, 0).decode(), size) for descriptor, size in link.memory]


def test_all_ranks_see_each_others_memory(paths):
    found = run_together([0, 1, 2], paths, ["t"] * 3)
    for rank in range(3):
        others = set(range(3)) - {rank}
        assert found[rank] == {other: [(f"memory of {other}", 100 + other)] for other in others}


def test_a_missing_peer_is_not_waited_for_longer_than_patience(paths):
    started = time.monotonic()
    assert run_together([1], paths, ["t"] * 3, patience_s=0.2) == {1: {}}
    assert time.monotonic() - started < 2


def test_a_caller_from_another_reload_is_not_let_in(paths):
    found = run_together([0, 1], paths, ["new", "old"], patience_s=0.3)
    assert found == {0: {}, 1: {}}


def test_no_descriptor_stays_open(paths):
    before = len(list(Path("/proc/self/fd").iterdir()))
    run_together([0, 1, 2], paths, ["a", "a", "b"], patience_s=0.3)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_killed_workers_socket_file_is_taken_over(paths):
    Listener(paths[0]).close()
    Listener(paths[0]).close()
