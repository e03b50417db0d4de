"""Several daemons for one socket: one serves, the others leave at once."""

from __future__ import annotations

import subprocess

from gpuctl.errors import Busy


def test_the_winner_serves_and_a_latecomer_changes_nothing(shared_daemon):
    late = subprocess.Popen(
        shared_daemon.command, env=shared_daemon.environ, stderr=subprocess.PIPE, text=True
    )
    assert f"pid {shared_daemon.process.pid}" in late.communicate(timeout=20)[1]
    assert late.returncode == Busy.exit_status
    with shared_daemon.client(timeout=5) as client:
        assert client.ping()["pid"] == shared_daemon.process.pid
