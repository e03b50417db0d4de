"""gpuctl doctor says what stands in the way."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from gpuctl.cli.app import gpuctl


@pytest.fixture
def pipes(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("GPUCTL_SOCKET", f"ipc://{tmp_path}/nobody")
    return tmp_path


def finding(what):
    told = CliRunner().invoke(gpuctl, ["doctor", "--json"])
    [found] = [each for each in json.loads(told.output)["findings"] if each["what"] == what]
    return found


def test_a_running_mps_server_is_warned_of(pipes):
    assert finding("MPS")["remedy"] == ""
    (pipes / "control").touch()
    assert str(pipes) in finding("MPS")["found"]
    assert "ends the others" in finding("MPS")["remedy"]


def test_a_missing_daemon_is_a_finding_with_a_remedy(pipes):
    assert str(pipes) in finding("daemon")["found"]
    assert finding("daemon")["remedy"]
