"""``gpuctl run`` and leases: the GPUs go to another program and come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from gpuctl import GpuctlError

PROMPT = "a small green star on a white background"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], 137),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_the_commands_own_status_is_the_answer_and_the_models_are_back(daemon, command, status):
    daemon.cli("run", "--", *command, check=status)
    assert daemon.states() == ["loaded", "loaded"]


def test_the_command_has_stdin_stdout_and_free_gpus(daemon):
    code = "import sys; print(sys.stdin.read().upper())"
    done = daemon.cli("run", "--", sys.executable, "-c", code, input="hello")
    assert done.stdout.strip() == "HELLO"
    assert "freed" in done.stderr


def test_rounds_leave_the_images_as_they_were(daemon):
    client = daemon.client()
    [before] = client.generate("shapes", PROMPT, seed=5)
    for _ in range(5):
        daemon.cli("run", "--", "true")
    [after] = client.generate("shapes", PROMPT, seed=5)
    assert before.tobytes() == after.tobytes()


def _lease_held(status) -> bool:
    return any(lease["state"] == "held" for lease in status["leases"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_command_and_the_models_come_back(daemon, number):
    process = daemon.popen("run", "--", "sleep", "60")
    daemon.wait_for(_lease_held)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    assert daemon.states() == ["loaded", "loaded"]


@pytest.mark.parametrize("attempt", range(10))
def test_a_killed_client_gives_the_gpus_back_within_a_second(daemon, attempt):
    process = daemon.popen("run", "--", "sleep", "60", stderr=subprocess.DEVNULL)
    if attempt % 2:
        daemon.wait_for(_lease_held)
    time.sleep(0.03 * attempt)
    process.kill()
    process.wait()
    daemon.wait_for(lambda status: not status["leases"], 1.0)
    assert daemon.states() == ["loaded", "loaded"]


def test_the_command_dies_with_its_client(daemon, tmp_path):
    mark = tmp_path / "pid"
    script = f"echo $$ > {mark}; exec sleep 60"
    process = daemon.popen("run", "--", "sh", "-c", script, stderr=subprocess.DEVNULL)
    daemon.wait_for(_lease_held)
    while not mark.exists() or not mark.read_text().strip():
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 2
    while os.path.exists(f"/proc/{mark.read_text().strip()}"):  # noqa: PTH110
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_clients_take_turns_or_are_told(daemon):
    first = daemon.popen("run", "--", "sleep", "1.5", stderr=subprocess.DEVNULL)
    daemon.wait_for(_lease_held)
    refused = daemon.cli("run", "--", "true", check=7)
    assert f"pid {first.pid}" in refused.stderr
    started = time.monotonic()
    daemon.cli("run", "--wait", "20s", "--", "true")
    assert time.monotonic() - started > 0.5
    assert first.wait(10) == 0
    assert daemon.states() == ["loaded", "loaded"]


def test_nobody_loads_onto_a_leased_gpu(daemon):
    client = daemon.client()
    with client.lease(gpus=[0], queue_jobs=False):
        assert daemon.states() == ["parked", "loaded"]
        refused = daemon.cli("reload", "--gpu", "0", check=7)
        assert "leased to pid" in refused.stderr
        [image] = client.generate("shapes", PROMPT)
        assert image.width == 64
        with pytest.raises(GpuctlError):
            client.generate("shapes", PROMPT, options={"gpu": 0})
    assert daemon.states() == ["loaded", "loaded"]


def test_jobs_wait_for_the_end_of_a_lease(daemon):
    process = daemon.popen("run", "--", "sleep", "1", stderr=subprocess.DEVNULL)
    daemon.wait_for(_lease_held)
    [image] = daemon.client().generate("shapes", PROMPT)
    assert image.width == 64
    assert process.wait(10) == 0


def test_a_lease_is_released_by_its_id_and_a_strange_one_is_refused(daemon):
    held = daemon.cli("lease", "acquire", "--ttl", "30s").stdout.strip()
    assert held
    daemon.cli("lease", "release", "nope", check=2)
    daemon.cli("lease", "release", held)
    assert daemon.states() == ["loaded", "loaded"]
