"""One host copy for all workers: what it takes of the memory, and what it spares the disk."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import pytest

from tests.fakes.tiny_models import tiny_stable_diffusion
from tests.integration.daemon import states

WORKERS = 4
WORDS = 2_000_000
IN_OPEN = 0x20
EVENT = struct.Struct("iIII")


@pytest.fixture
def folder(tmp_path):
    return tiny_stable_diffusion(tmp_path / "large", WORDS)


@pytest.fixture
def large_daemon(own_daemon, folder):
    """Four workers that have drawn with another model, so that their imports are done."""
    daemon = own_daemon(WORKERS, more=f'[models.large]\npath = "{folder}"\n')
    client = daemon.client()
    for gpu in range(WORKERS):
        client.load("shapes", gpus=[gpu])
    client.drop("shapes")
    return daemon


def test_four_workers_share_one_host_copy(large_daemon):
    empty = _shared_out(large_daemon)
    client = large_daemon.client()
    loaded = client.load("large")
    model = loaded["workers"][0]["host_bytes"]
    assert model > 240e6
    client.unload()
    assert states(client.status(), "large") == ["parked"] * WORKERS
    assert _shared_out(large_daemon) - empty <= 1.15 * model


def test_twenty_cycles_leave_memory_flat(large_daemon):
    client = large_daemon.client()
    model = client.load("large")["workers"][0]["host_bytes"]
    client.unload()
    parked = _shared_out(large_daemon)
    for _ in range(20):
        client.reload()
        client.unload()
    assert _shared_out(large_daemon) - parked <= 0.02 * model


def _shared_out(daemon) -> int:
    """Bytes of all workers, each shared page divided among those that map it: the kernel's PSS."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in daemon.worker_pids()]
    lines = [line for text in rollups for line in text.splitlines() if line.startswith("Pss:")]
    return sum(int(line.split()[1]) * 1024 for line in lines)


class Opens:
    """Counts how often files of some folders are opened, by whatever process; see inotify(7)."""

    def __init__(self, folders: list[Path]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for folder in folders:
            assert libc.inotify_add_watch(self._descriptor, bytes(folder), IN_OPEN) >= 0

    def names(self) -> list[str]:
        """Of files opened since the last look."""
        found = []
        try:
            data = os.read(self._descriptor, 1 << 20)
        except BlockingIOError:
            return found
        while data:
            _, _, _, length = EVENT.unpack_from(data)
            name, data = data[EVENT.size : EVENT.size + length], data[EVENT.size + length :]
            found.append(name.rstrip(b"\0").decode())
        return found

    def close(self) -> None:
        os.close(self._descriptor)


def test_only_the_first_worker_opens_files_of_weights(large_daemon, folder):
    weights = {file.name for file in folder.rglob("*.safetensors")}
    opens = Opens([folder, *{file.parent for file in folder.rglob("*.safetensors")}])
    client = large_daemon.client()
    client.load("large", gpus=[0])
    assert weights <= set(opens.names()), "the first one reads them all"
    client.load("large", gpus=[1, 2, 3])
    assert states(client.status(), "large") == ["loaded"] * WORKERS
    assert not weights & set(opens.names())
    opens.close()
