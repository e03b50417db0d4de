"""Boot a real systemd as PID 1 in fresh namespaces, over a throw-away overlay of this root.

Runs as three processes in a row: ``keeper`` (outside, cleans up whatever happens), ``mounts``
(first process of the new namespaces) and ``cgroups``, which becomes systemd. Only the standard
library, for it runs with the machine's own Python. The keeper ends the machine when its standard
input ends, and that the kernel sees to even when the tests are killed.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

V1 = ("memory", "pids", "devices", "cpu", "cpuacct", "blkio")
CGROUPS = Path("/sys/fs/cgroup")
NODES = ("null", "zero", "full", "random", "urandom", "tty")
PR_SET_PDEATHSIG = 1
TARGET = "[Unit]\nRequires=sysinit.target\nAfter=sysinit.target\nAllowIsolate=yes\n"


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def bind(source: str, target: Path, *, writable: bool = True) -> None:
    if Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.touch()
    mount("--bind", source, target)
    if not writable:
        mount("-o", "remount,bind,ro", target)


def unified() -> bool:
    return (CGROUPS / "cgroup.controllers").exists()


def hierarchies() -> list[tuple[str, Path]]:
    """Name as in /proc/self/cgroup, and mount point, of each hierarchy that systemd needs."""
    if unified():
        return [("", CGROUPS)]
    named = [(name, CGROUPS / name) for name in V1 if (CGROUPS / name).is_dir()]
    return [*named, ("name=systemd", CGROUPS / "systemd"), ("", CGROUPS / "unified")]


def own_cgroup(name: str) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controller, path = line.split(":", 2)
        if controller == name:
            return path.lstrip("/")
    return ""


def own_cgroups(machine: str) -> list[Path]:
    return [place / own_cgroup(name) / machine for name, place in hierarchies()]


def mounts(spec: dict) -> None:
    """In the new namespaces: the root that systemd will see."""
    work = Path(spec["work"])
    root = work / "root"
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", "size=4g,mode=755", "tmpfs", work)
    for name in ("upper", "scratch", "root"):
        (work / name).mkdir()
    layers = f"lowerdir=/,upperdir={work}/upper,workdir={work}/scratch"
    mount("-t", "overlay", "overlay", "-o", layers, root)
    mount("-t", "proc", "proc", root / "proc")
    mount("-t", "sysfs", "-o", "ro", "sysfs", root / "sys")
    bind(f"{root}/proc/sys", root / "proc/sys", writable=False)  # this machine's sysctls
    for place, mode in (("run", "755"), ("tmp", "1777"), ("dev", "755")):
        mount("-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", root / place)
    devices(root / "dev")
    for source, target in spec["binds"]:
        bind(source, root / target.lstrip("/"), writable=False)
    for cgroup in own_cgroups(spec["machine"]):
        cgroup.mkdir()
        (cgroup / "cgroup.procs").write_text("0")
    os.execvp("unshare", ["unshare", "--cgroup", "--", *stage("cgroups", spec)])


def devices(dev: Path) -> None:
    gpus = [node.name for node in Path("/dev").glob("nvidia*") if node.is_char_device()]
    for node in (*NODES, *gpus):
        bind(f"/dev/{node}", dev / node)
    (dev / "pts").mkdir()
    (dev / "shm").mkdir()
    mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=620", "devpts", dev / "pts")
    mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", dev / "shm")
    (dev / "ptmx").symlink_to("pts/ptmx")
    (dev / "fd").symlink_to("/proc/self/fd")


def cgroups(spec: dict) -> None:
    """In the new cgroup namespace: mount its hierarchies, enter the root, become systemd."""
    root = Path(spec["work"]) / "root"
    base = root / "sys/fs/cgroup"
    if unified():
        mount("-t", "cgroup2", "cgroup2", base)
    else:
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", base)
        for name, place in hierarchies():
            mount_v1(name, base / place.name)
    (root / "etc/fstab").write_text("")
    (root / "etc/machine-id").write_text("")
    (root / "etc/systemd/system/boot-test.target").write_text(TARGET)
    shutil.rmtree(root / "var/log/journal", ignore_errors=True)
    old = root / "mnt/old"
    old.mkdir(parents=True)
    os.chdir(root)
    subprocess.run(["pivot_root", ".", "mnt/old"], check=True)
    os.chdir("/")
    subprocess.run(["umount", "-l", "/mnt/old"], check=True)
    environ = {"container": "other", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    options = ["--system", "--unit=boot-test.target", "--log-target=journal", "--show-status=0"]
    os.execve("/lib/systemd/systemd", ["systemd", *options], environ)


def mount_v1(name: str, place: Path) -> None:
    place.mkdir()
    if not name:
        mount("-t", "cgroup2", "cgroup2", place)
    else:
        mount("-t", "cgroup", "-o", f"none,{name}" if "=" in name else name, "cgroup", place)


def stage(name: str, spec: dict) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), name, json.dumps(spec)]


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def keeper(spec: dict) -> None:
    """Start the machine, say when it is up, wait for the end of standard input, remove all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    spec["work"] = tempfile.mkdtemp(prefix="systemd-test-")
    spec["machine"] = f"gpuctl-test-{os.getpid()}"
    flags = ["--mount", "--pid", "--uts", "--ipc", "--net", "--fork", "--mount-proc"]
    command = ["unshare", *flags, "--kill-child=KILL", "--", *stage("mounts", spec)]
    with Path(spec["work"], "log").open("w+") as log:
        outer = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        try:
            pid = wait_until_up(outer)
            log.seek(0)
            print(json.dumps({"pid": pid, "error": log.read()[-2000:]}), flush=True)  # noqa: T201
            sys.stdin.read()
        finally:
            outer.kill()
            outer.wait()
            remove(spec)


def wait_until_up(outer: subprocess.Popen) -> int | None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and outer.poll() is None:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        if children and is_up(int(children[0])):
            return int(children[0])
        time.sleep(0.05)
    return None


def is_up(pid: int) -> bool:
    ask = ["nsenter", "-t", str(pid), "-a", "systemctl", "is-system-running"]
    answer = subprocess.run(ask, capture_output=True, text=True, check=False)
    return answer.stdout.strip() in {"running", "degraded"}


def remove(spec: dict) -> None:
    deadline = time.monotonic() + 10
    left = own_cgroups(spec["machine"])
    while left and time.monotonic() < deadline:
        for cgroup in left:
            remove_cgroup(cgroup)
        left = [cgroup for cgroup in left if cgroup.exists()]
        time.sleep(0.05)
    shutil.rmtree(spec["work"], ignore_errors=True)


def remove_cgroup(cgroup: Path) -> None:
    for folder, _, _ in os.walk(cgroup, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


if __name__ == "__main__":
    {"keeper": keeper, "mounts": mounts, "cgroups": cgroups}[sys.argv[1]](json.loads(sys.argv[2]))
