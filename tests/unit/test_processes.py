"""Processes that are not our children: their end is noticed, whatever else is scarce."""

from __future__ import annotations

import errno
import os
import subprocess
import time

import pytest

from gpuctld.processes import Processes


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def ended(processes):
    """Keys of what has ended, within a second."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        found = list(processes.ended(set(processes.descriptors())))
        if found:
            return found
        time.sleep(0.01)
    return []


def test_an_end_is_told_once(sleeper):
    processes = Processes()
    processes.watch("lease", sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert ended(processes) == ["lease"]
    assert processes.descriptors() == []


def test_a_process_that_has_gone_already_is_told(sleeper):
    sleeper.kill()
    sleeper.wait()
    processes = Processes()
    processes.watch("lease", sleeper.pid)
    assert ended(processes) == ["lease"]


def test_a_process_that_has_a_dead_ones_pid_is_not_taken_for_it(sleeper):
    processes = Processes()
    processes.watch("before", sleeper.pid, time.monotonic() - 60)
    assert list(processes.ended(set())) == ["before"]
    processes.watch("after", sleeper.pid, time.monotonic())
    assert list(processes.ended(set())) == []
    assert len(processes.descriptors()) == 1
    processes.forget("after")


def test_without_a_descriptor_it_is_tried_again(sleeper, monkeypatch):
    processes = Processes()
    with monkeypatch.context() as scarce:
        scarce.setattr(os, "pidfd_open", _no_descriptors)
        processes.watch("lease", sleeper.pid)
        assert list(processes.ended(set())) == []
    assert list(processes.ended(set())) == []
    assert len(processes.descriptors()) == 1
    processes.forget("lease")
    assert processes.descriptors() == []


def _no_descriptors(pid):
    raise OSError(errno.EMFILE, "too many open files")
