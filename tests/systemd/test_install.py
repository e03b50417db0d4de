"""``make install`` as an administrator runs it: a virtual environment of its own, from the index.

It takes one to three minutes, most of them to unpack torch, so this runs by hand:
``GPUCTL_TEST_INSTALL=1 pytest tests/systemd/test_install.py``.
"""

import json
import os

import pytest
from tests.systemd.machine import SOURCE

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        "GPUCTL_TEST_INSTALL" not in os.environ, reason="installs torch: set GPUCTL_TEST_INSTALL"
    ),
]
CONFIG = '[daemon]\ndevices = ["cpu", "cpu"]\nthreads = 1\n'
INSTALL = (
    *("env", "PIP_CONSTRAINT=/srv/gpuctl/constraints.txt"),  # the versions that were tested
    *("make", "-C", "/srv/gpuctl", "install"),
)


def test_three_commands_lead_from_a_checkout_to_a_green_service(machine):
    machine.run("cp", "-r", SOURCE, "/srv/gpuctl")  # a checkout that pip may build in
    machine.online(*INSTALL)
    machine.write("/etc/gpuctl/config.toml", CONFIG)
    machine.run("systemctl", "enable", "--now", "gpuctld")
    machine.run("useradd", "--create-home", "--groups", "gpuctl", "member")
    status = json.loads(machine.run("gpuctl", "status", "--json", user="member").stdout)
    assert [worker["state"] for worker in status["workers"]] == ["ready", "ready"]
    machine.online(*INSTALL)  # an upgrade
    machine.run("systemctl", "restart", "gpuctld")
    machine.run("make", "-C", "/srv/gpuctl", "uninstall", "PURGE=1")
    assert not machine.exists("/opt/gpuctl")
