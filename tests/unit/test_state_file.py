"""What was loaded where survives whatever goes wrong with its file, or is let go with a word."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuctld import state_file
from gpuctld.fleet.events import Peer
from gpuctld.fleet.snapshot import KeptLease, Snapshot
from gpuctld.state_file import StateFile

LEASE = KeptLease(
    id="ab12",
    gpus=[1],
    holder=Peer(pid=7, uid=1000),
    command="score.py",
    queue_jobs=True,
    ttl_s=None,
    asked_at=12.5,
    restore={1: ["flux"]},
)
WANTED = Snapshot(wanted={0: {"flux": "device", "sd": "host"}, 1: {"flux": "host"}}, leases=[LEASE])
OTHER = Snapshot(wanted={0: {"flux": "host"}})
NOTHING = Snapshot()


@pytest.fixture
def file_limit():
    """Sets how many bytes a file may have; what goes beyond fails as a full disk does."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_what_was_saved_is_read(tmp_path):
    StateFile(tmp_path / "state").save(WANTED)
    assert StateFile(tmp_path / "state").read() == WANTED


def test_a_lease_does_not_outlive_the_machine_it_was_on(tmp_path, monkeypatch):
    other = tmp_path / "boot_id"
    other.write_text("another boot")
    StateFile(tmp_path).save(WANTED)
    monkeypatch.setattr(state_file, "BOOT_ID", other)
    assert StateFile(tmp_path).read() == Snapshot(
        wanted={0: {"flux": "device", "sd": "host"}, 1: {"flux": "device"}}
    )


def test_a_file_cut_at_any_byte_never_stops_the_start(tmp_path):
    StateFile(tmp_path).save(WANTED)
    whole = StateFile(tmp_path).path.read_bytes()
    for length in range(len(whole) - 2):
        StateFile(tmp_path).path.write_bytes(whole[:length])
        fresh = StateFile(tmp_path)
        assert fresh.read() == NOTHING
        assert not fresh.path.exists(), "it is set aside"
        fresh.save(WANTED)
        assert StateFile(tmp_path).read() == WANTED


@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_nothing(tmp_path_factory, data):
    home = tmp_path_factory.mktemp("state")
    StateFile(home).path.write_bytes(data)
    assert StateFile(home).read() == NOTHING


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=8,
    )
)
def test_no_document_stops_the_start(tmp_path_factory, document):
    home = tmp_path_factory.mktemp("state")
    StateFile(home).path.write_text(json.dumps({"wanted": document}))
    assert isinstance(StateFile(home).read(), Snapshot)


def test_a_disk_that_is_full_at_any_byte_keeps_the_old_file(tmp_path, file_limit):
    kept = StateFile(tmp_path)
    kept.save(WANTED)
    size = len(kept.path.read_bytes())
    for limit in range(size):
        full = StateFile(tmp_path)
        file_limit(limit)
        full.save(attrs.evolve(WANTED, wanted={**WANTED.wanted, 2: {"flux": "device"}}))
        file_limit(resource.RLIM_INFINITY)
        assert full.problem.startswith("state not saved")
        assert StateFile(tmp_path).read() == WANTED
        full.save(OTHER)
        assert full.problem == ""
        full.save(WANTED)


def test_a_folder_that_takes_no_file_is_told_and_tried_again():
    nowhere = StateFile(Path("/proc/self"))
    assert nowhere.read() == NOTHING
    nowhere.save(WANTED)
    assert nowhere.problem.startswith("state not saved")
