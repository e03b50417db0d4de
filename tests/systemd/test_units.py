import os
import shutil
import subprocess
import sys

import pytest
from tests.systemd.machine import CHECKOUT

from gpuctld import config

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs the package systemd"
)
UNITS = CHECKOUT / "systemd"
SERVICES = ("gpuctld.service", "gpuctld-workers.service")


def install(tmp_path, action="install", **variables):
    environ = os.environ | {"DESTDIR": str(tmp_path / "stage"), "SERVICE_PYTHON": sys.executable}
    script = [str(UNITS / "install.sh"), action]
    return subprocess.run(
        script, env=environ | variables, check=True, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "path",
    [
        "system/gpuctld.service",
        "system/gpuctld-workers.socket",
        "system/gpuctld-workers.service",
        "system/gpuctld-nvidia.service",
        "user/gpuctld.service",
    ],
)
def test_units_are_clean(tmp_path, path):
    install(tmp_path)
    units = tmp_path / "stage/usr/local/lib/systemd"
    for unit in units.glob("*/*"):
        unit.write_text(unit.read_text().replace("/opt/", f"{tmp_path}/stage/opt/"))
    scope = ["--user"] if path.startswith("user/") else []
    command = ["systemd-analyze", *scope, "verify", "--man=no", str(units / path)]
    environ = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", SERVICES)
def test_the_services_are_hardened(name):
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20"]
    done = subprocess.run(
        [*command, str(UNITS / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_services_are_hardened_alike():
    controller, workers = (hardening((UNITS / name).read_text()) for name in SERVICES)
    assert controller == workers


def hardening(unit):
    """The settings from the first hardening one on."""
    lines = unit[unit.index("NoNewPrivileges=") :].partition("[Install]")[0].splitlines()
    return [line for line in lines if "=" in line and not line.startswith("#")]


@pytest.mark.parametrize("tool", ["sysusers", "tmpfiles"])
def test_accounts_and_folders_are_declared_well(tmp_path, tool):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("gpuctl:x:990:990::/:/usr/sbin/nologin\n")
    (tmp_path / "etc/group").write_text("gpuctl:x:990:\n")
    action = ["--dry-run"] if tool == "sysusers" else ["--create"]
    config = str(UNITS / f"{tool}.d/gpuctl.conf")
    command = [f"systemd-{tool}", f"--root={tmp_path}", *action, config]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_default_config_is_valid():
    assert config.parse((UNITS / "config.toml").read_text()).models == {}


def test_an_edited_config_survives_an_upgrade(tmp_path):
    install(tmp_path)
    target = tmp_path / "stage/etc/gpuctl/config.toml"
    target.write_text("# mine\n")
    install(tmp_path)
    assert target.read_text() == "# mine\n"
    assert target.with_name("config.toml.new").exists()


def test_uninstall_leaves_nothing(tmp_path):
    install(tmp_path)
    install(tmp_path, "uninstall", PURGE="1")
    assert [path for path in (tmp_path / "stage").rglob("*") if not path.is_dir()] == []
