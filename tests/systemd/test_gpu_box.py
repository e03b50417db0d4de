"""The installed service on a machine with GPUs: the hardening leaves CUDA what it needs."""

import json
import os

import pytest
from tests.systemd.machine import PYTHON, SOURCE

pytestmark = [pytest.mark.gpu, pytest.mark.systemd, pytest.mark.slow]

CONFIG = f'[models.shapes]\npath = "{SOURCE}/demo/gpuctl_demo/models/shapes"\n'
DRAW = ("generate", "shapes", "a large red circle on white", "--seed", "7", "--steps", "4")
UNITS = ("gpuctld", "gpuctld-workers", "gpuctld-nvidia")
SUSPENDED_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def box(machine):
    if not os.path.exists("/dev/nvidiactl"):  # noqa: PTH110  no torch, no driver: just a look
        pytest.skip("no NVIDIA GPU")
    machine.run("make", "-C", SOURCE, "install", f"SERVICE_PYTHON={PYTHON}")
    machine.run("useradd", "--create-home", "member")
    machine.run("usermod", "-aG", "gpuctl", "member")
    machine.write("/etc/gpuctl/config.toml", CONFIG)
    started = machine.run("systemctl", "start", "gpuctld", check=False)
    said = [entry.get("MESSAGE") for unit in UNITS for entry in machine.journal(unit)[-15:]]
    assert started.returncode == 0, said
    return machine


def gpuctl(box, *words):
    done = box.run("gpuctl", *words, user="member", check=False)
    assert done.returncode == 0, (done.stdout, done.stderr, box.journal("gpuctld-workers")[-15:])
    return done.stdout


def workers(box):
    return json.loads(gpuctl(box, "status", "--json"))["workers"]


def picture(box):
    folder = box.run("mktemp", "-d", user="member").stdout.strip()
    gpuctl(box, *DRAW, "--out", f"{folder}/a.png")
    return box.run("md5sum", f"{folder}/a.png").stdout.split()[0]


def test_every_gpu_has_a_worker(box):
    found = workers(box)
    assert found
    assert {worker["state"] for worker in found} == {"ready"}
    assert all(worker["device"].startswith("cuda:") for worker in found)


def test_models_leave_the_gpus_and_come_back(box):
    gpuctl(box, "load", "shapes")
    before = picture(box)
    gpuctl(box, "unload")
    gpuctl(box, "reload", "--verify")
    assert picture(box) == before


def test_the_context_can_be_suspended_and_woken(box):
    gpuctl(box, "load", "shapes")
    before = picture(box)
    gone = json.loads(gpuctl(box, "unload", "--suspend", "--json"))
    assert gone["ok"], gone
    asleep = [row for row in gone["workers"] if row["state"] == "suspended"]
    assert len(asleep) == len(workers(box))
    assert all(row["residual_bytes"] <= SUSPENDED_BYTES for row in asleep)
    gpuctl(box, "reload")
    assert picture(box) == before


def test_host_memory_is_pinned_without_a_limit(box):
    for worker in workers(box):
        limits = box.run("cat", f"/proc/{worker['pid']}/limits").stdout
        [locked] = [line for line in limits.splitlines() if line.startswith("Max locked memory")]
        assert locked.split()[3] == "unlimited"
