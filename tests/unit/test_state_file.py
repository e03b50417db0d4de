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
WANTED = Snapshot(
    wanted={0: {"flux": "device", "sd": "host"}, 1: {"flux": "host"}}, suspended=[1], leases=[LEASE]
)
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


@pytest.fixture
def reboot(tmp_path, monkeypatch):
    """The machine starts anew."""

    def start_anew():
        boot = tmp_path / "boot_id"
        boot.write_text("another boot")
        monkeypatch.setattr(state_file, "BOOT_ID", boot)

    return start_anew


def keep(home, snapshot):
    """Save it in both files."""
    kept = StateFile(home)
    kept.save(snapshot)
    kept.sync()
    assert kept.problem == ""
    return kept


def files(home):
    made = StateFile(home)
    return made.live, made.path


def test_what_was_saved_is_read(tmp_path):
    StateFile(tmp_path / "state").save(WANTED)
    assert StateFile(tmp_path / "state").read() == WANTED


def test_after_a_reboot_what_was_synced_is_read_and_leases_are_over(tmp_path, reboot):
    keep(tmp_path, WANTED).save(OTHER)
    reboot()
    assert StateFile(tmp_path).read() == Snapshot(
        wanted={0: {"flux": "device", "sd": "host"}, 1: {"flux": "device"}}, suspended=[1]
    )


def test_files_cut_at_any_byte_never_stop_the_start(tmp_path):
    keep(tmp_path, WANTED)
    whole = StateFile(tmp_path).path.read_bytes()
    for length in range(len(whole) - 2):
        for file in files(tmp_path):
            file.write_bytes(whole[:length])
        assert StateFile(tmp_path).read() == NOTHING
        assert not any(file.exists() for file in files(tmp_path)), "they are set aside"
        keep(tmp_path, WANTED)
        assert StateFile(tmp_path).read() == WANTED


@pytest.mark.parametrize("which", [0, 1])
def test_one_file_stands_in_for_the_other(tmp_path, which):
    keep(tmp_path, WANTED)
    file = files(tmp_path)[which]
    for damage in (b"", b"{", b'{"boot": 3}'):
        file.write_bytes(damage)
        assert StateFile(tmp_path).read() == WANTED


@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_nothing(tmp_path_factory, data):
    home = tmp_path_factory.mktemp("state")
    for file in files(home):
        file.write_bytes(data)
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
    for file in files(home):
        file.write_text(json.dumps({"wanted": document}))
    assert isinstance(StateFile(home).read(), Snapshot)


LARGER = attrs.evolve(WANTED, wanted={**WANTED.wanted, 2: {"flux": "device"}})


def test_a_disk_that_is_full_at_any_byte_keeps_the_old_file(tmp_path, file_limit):
    size = len(keep(tmp_path, WANTED).live.read_bytes())
    for limit in range(size):
        full = StateFile(tmp_path)
        file_limit(limit)
        full.save(LARGER)
        file_limit(resource.RLIM_INFINITY)
        assert full.problem.startswith("state not saved")
        assert StateFile(tmp_path).read() == WANTED
        full.save(OTHER)
        assert full.problem == ""
        full.save(WANTED)


def test_a_disk_that_is_full_at_any_byte_of_a_sync_keeps_the_old_file(tmp_path, file_limit):
    size = len(keep(tmp_path, OTHER).path.read_bytes())
    for limit in range(size):
        full = StateFile(tmp_path)
        full.save(LARGER)
        file_limit(limit)
        full.sync()
        file_limit(resource.RLIM_INFINITY)
        assert full.problem.startswith("state not saved")
        full.live.unlink()
        assert StateFile(tmp_path).read() == OTHER
        full.sync()
        assert full.problem == ""
        assert StateFile(tmp_path).read() == LARGER
        keep(tmp_path, OTHER)


def test_a_folder_that_takes_no_file_is_told_and_tried_again():
    nowhere = StateFile(Path("/proc/self"))
    assert nowhere.read() == NOTHING
    nowhere.save(WANTED)
    assert nowhere.problem.startswith("state not saved")
