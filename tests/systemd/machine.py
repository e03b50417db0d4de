"""A machine with a real systemd, as the tests use it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import attrs

CHECKOUT = Path(__file__).resolve().parents[2]
BOOT = Path(__file__).with_name("boot.py")
SOURCE = "/opt/test/src"
PYTHON = "/opt/test/python"
MODELS = "/opt/test/models"
ENVIRON = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


def why_not() -> str | None:
    """The reason why no machine can be booted here; ``None`` when one can."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/lib/systemd/systemd").exists():
        return "needs the package systemd"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "needs overlayfs"
    missing = [tool for tool in ("unshare", "nsenter", "setpriv") if not shutil.which(tool)]
    return f"needs {', '.join(missing)}" if missing else None


def binds(stage: Path) -> list[tuple[str, str]]:
    """What the fresh /tmp and the unit's ProtectHome would hide, at places they do not."""
    return [
        (str(stage / "src"), SOURCE),
        (str(stage / "models"), MODELS),
        (sys.base_prefix, "/opt/test/base"),
        (str(Path(sysconfig.get_path("purelib")).parents[1]), "/opt/test/venv/lib"),
        *[(place, f"/opt/test/more/{number}") for number, place in enumerate(more_packages())],
        *[(place, place) for place in driver_mounts()],
    ]


def more_packages() -> list[str]:
    """Folders outside the checkout that whoever runs the tests has added for Python."""
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [each for each in places if each and not Path(each).is_relative_to(CHECKOUT)]


def driver_mounts() -> list[str]:
    """Where a container or a virtual machine has got its NVIDIA driver from outside."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    kernels = ("/dev/", "/proc/", "/sys/")
    return [each for each in points if "nvidia" in each and not each.startswith(kernels)]


def interpreter() -> str:
    """A shell script that is the tests' Python inside of the machine."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    rooms = [f"{SOURCE}/{room}" for room in ("ctl", "daemon")]
    path = ":".join([*rooms, *[f"/opt/test/more/{each}" for each in range(len(more_packages()))]])
    driver = os.environ.get("LD_LIBRARY_PATH", "")
    libraries = f"/opt/test/base/lib:{driver}".rstrip(":")
    return (
        f"#!/bin/sh\nexport PYTHONPATH={path} LD_LIBRARY_PATH={libraries} OMP_NUM_THREADS=1\n"
        f'export PYTHONDONTWRITEBYTECODE=1\nexec /opt/test/venv/bin/{version} "$@"\n'
    )


@attrs.define
class Machine:
    """Runs commands and writes files in a booted machine; :meth:`close` removes it."""

    keeper: subprocess.Popen[str]
    pid: int

    @classmethod
    def boot(cls, stage: Path) -> "Machine":
        """Boot, with the sources and models of ``stage`` in it, and wait until systemd is up.

        Raises:
            RuntimeError: it did not come up; with what it said.
        """
        command = [sys.executable, str(BOOT), "keeper", json.dumps({"binds": binds(stage)})]
        keeper = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        answer = json.loads(keeper.stdout.readline() or '{"pid": null, "error": "no keeper"}')
        if answer["pid"] is None:
            keeper.communicate()
            raise RuntimeError(f"the machine did not boot: {answer['error']}")
        machine = cls(keeper, answer["pid"])
        machine.add_python()
        return machine

    def add_python(self) -> None:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.write("/opt/test/venv/pyvenv.cfg", "home = /opt/test/base/bin\n")
        self.run("mkdir", "-p", "/opt/test/venv/bin")
        self.run("ln", "-s", f"/opt/test/base/bin/{version}", f"/opt/test/venv/bin/{version}")
        self.write(PYTHON, interpreter(), mode="755")

    def close(self) -> None:
        self.keeper.communicate(timeout=30)

    def run(
        self, *command: str, user: str | None = None, check: bool = True, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root or as ``user`` with all of that user's groups.

        Raises:
            AssertionError: it failed and ``check`` is set; with its output.
        """
        done = subprocess.run(
            self.inside(command, user),
            input=text or "",
            capture_output=True,
            text=True,
            env=ENVIRON,
            timeout=100,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def online(self, *command: str) -> None:
        """Run a command inside, but with this machine's network and its pip's settings.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        enter = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-p"]
        pip = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
        subprocess.run([*enter, *command], env=ENVIRON | pip, check=True)

    def popen(self, *command: str, user: str) -> subprocess.Popen[str]:
        """Start a command inside, with pipes to and from it."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(self.inside(command, user), text=True, env=ENVIRON, **pipes)

    def inside(self, command: tuple[str, ...], user: str | None) -> list[str]:
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"]
        return ["nsenter", "-t", str(self.pid), "-a", *(become if user else []), *command]

    def write(self, path: str, content: str, mode: str = "644") -> None:
        self.run("mkdir", "-p", str(Path(path).parent))
        self.run("sh", "-c", 'cat > "$1"; chmod "$2" "$1"', "sh", path, mode, text=content)

    def exists(self, path: str) -> bool:
        return self.run("test", "-e", path, check=False).returncode == 0

    def unit(self, name: str = "gpuctld") -> dict[str, str]:
        """The unit's properties."""
        shown = self.run("systemctl", "show", name).stdout.splitlines()
        return dict(line.split("=", 1) for line in shown if "=" in line)

    def journal(self, unit: str = "gpuctld") -> list[dict[str, Any]]:
        self.run("journalctl", "--sync")
        lines = self.run("journalctl", "-u", unit, "-o", "json", "--no-pager").stdout.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait(self, what: dict[str, str], timeout_s: float, unit: str = "gpuctld") -> float:
        """Seconds until the unit's properties are as in ``what``.

        Raises:
            AssertionError: they are not so in time.
        """
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            shown = self.unit(unit)
            if what.items() <= shown.items():
                return time.monotonic() - began
            time.sleep(0.1)
        tail = [entry.get("MESSAGE") for entry in self.journal(unit)[-10:]]
        raise AssertionError(f"{ {key: shown[key] for key in what} } instead of {what}: {tail}")
