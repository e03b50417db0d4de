"""``gpuctl run`` and leases: the GPUs go to another program and come back."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from gpuctl import GpuctlError
from gpuctl.protocol import LeaseAcquire, LeaseRelease
from tests.integration.daemon import CLI, FAULTY, states

ROUNDS = 20
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


@pytest.mark.parametrize(
    ("first_line", "status"), [("#!/no/such/interpreter", 127), ("\x7fELF", 126)]
)
def test_a_command_that_only_the_kernel_finds_wrong_is_told_as_by_a_shell(
    daemon, tmp_path, first_line, status
):
    program = tmp_path / "program"
    program.write_text(f"{first_line}\n")
    program.chmod(0o755)
    daemon.cli("run", "--", str(program), check=status)
    assert daemon.states() == ["loaded", "loaded"]


def test_a_command_given_gpus_sees_no_others(daemon):
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    seen = daemon.cli("run", "--gpu", "1", "--", sys.executable, "-c", code)
    assert seen.stdout == "\n", "none, for these are CPU devices"


def test_the_command_has_stdin_stdout_and_free_gpus(daemon):
    code = "import sys; print(sys.stdin.read().upper())"
    done = daemon.cli("run", "--", sys.executable, "-c", code, input="hello")
    assert done.stdout.strip() == "HELLO"
    assert "freed" in done.stderr


def test_rounds_leave_the_images_as_they_were(daemon):
    client = daemon.client()
    [before] = client.generate("shapes", PROMPT, seed=5)
    for _ in range(ROUNDS):
        daemon.cli("run", "--", "true")
    [after] = client.generate("shapes", PROMPT, seed=5)
    assert before.tobytes() == after.tobytes()


def _lease_held(status) -> bool:
    return any(lease["state"] == "held" for lease in status["leases"])


@pytest.mark.parametrize("after_s", [0, 0.02, 0.3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_command_and_the_models_come_back(daemon, number, after_s):
    process = daemon.popen("run", "--", "sleep", "60")
    daemon.wait_for(_lease_held)
    time.sleep(after_s)
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    assert daemon.states() == ["loaded", "loaded"]


def _wait_until(condition, seconds) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _gone(pid: int) -> bool:
    return _wait_until(lambda: not psutil.pid_exists(pid), 2)


def test_the_command_dies_with_its_client(daemon, tmp_path):
    mark = tmp_path / "pid"
    script = f"echo $$ > {mark}; exec sleep 60"
    process = daemon.popen("run", "--", "sh", "-c", script, stderr=subprocess.DEVNULL)
    daemon.wait_for(_lease_held)
    while not mark.exists() or not mark.read_text().strip():
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert _gone(int(mark.read_text()))


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
        forced = daemon.cli("reload", "--gpu", "0", "--force")
        assert f"gpu 0 leased to pid {os.getpid()}, forced" in forced.stdout
        assert daemon.states() == ["loaded", "loaded"]
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_lease_and_the_command_never_runs(daemon, tmp_path, number):
    with daemon.client().lease() as first:
        mark = tmp_path / "ran"
        process = daemon.popen("run", "--wait", "60s", "--", "touch", str(mark))
        daemon.wait_for(lambda status: len(status["leases"]) == 2)
        process.send_signal(number)
        assert process.wait(5) == 128 + number
        daemon.wait_for(lambda status: [x["id"] for x in status["leases"]] == [first["id"]])
    assert not mark.exists()
    assert daemon.states() == ["loaded", "loaded"]


def _in_terminal(daemon, *words):
    """The command in a terminal of its own: its pid and our end of the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execvpe(CLI[0], [*CLI, *words], daemon.environ)
    return pid, terminal


def _read_until(terminal, word):
    seen = b""
    deadline = time.monotonic() + 20
    while word not in seen and time.monotonic() < deadline:
        seen += os.read(terminal, 4096)
    assert word in seen
    return seen


def test_the_command_has_the_terminal_and_control_c_reaches_it(daemon):
    code = "import sys, time; print('tty', sys.stdin.isatty(), flush=True); time.sleep(60)"
    pid, terminal = _in_terminal(daemon, "run", "--", sys.executable, "-c", code)
    _read_until(terminal, b"tty True")
    os.write(terminal, b"\x03")
    _read_until(terminal, b"KeyboardInterrupt")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert daemon.states() == ["loaded", "loaded"]


def test_a_closed_terminal_ends_the_command_and_the_models_come_back(daemon):
    pid, terminal = _in_terminal(daemon, "run", "--", "sleep", "60")
    daemon.wait_for(_lease_held)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert daemon.wait_for(lambda status: not status["leases"])
    assert daemon.states() == ["loaded", "loaded"]


@pytest.fixture
def happenings(daemon):
    """What subscribers are told from the start of the test on; jobs show that they listen."""
    told: list[dict] = []

    def listen() -> None:
        with contextlib.suppress(GpuctlError):  # the daemon ends before we do
            told.extend(daemon.client().events())

    threading.Thread(target=listen, daemon=True).start()
    while not _jobs_done(told):
        daemon.client().generate("shapes", PROMPT)
    return told


def _jobs_done(told: list[dict]) -> int:
    return sum(event.get("state") == "done" for event in told)


@pytest.mark.parametrize(
    ("words", "check"),
    [
        (["run", "--gpu", "7", "--", "true"], 8),
        (["run", "--need", "900TiB", "--", "true"], 5),
        (["run", "--", "no-such-command"], 127),
        (["run", "--", "/etc/passwd"], 126),
        (["lease", "release", "no-such-lease"], 2),
        (["lease", "renew", "no-such-lease"], 2),
    ],
)
def test_wrong_use_is_told_and_moves_nothing(daemon, happenings, words, check):
    before = daemon.client().status()["workers"]
    daemon.cli(*words, check=check)
    jobs = _jobs_done(happenings)
    daemon.client().generate("shapes", PROMPT)
    assert _wait_until(lambda: _jobs_done(happenings) > jobs, 5)
    assert {event["event"] for event in happenings} == {"job"}
    after = daemon.client().status()["workers"]
    assert [worker["models"] for worker in after] == [worker["models"] for worker in before]


def test_a_command_that_outlives_its_killed_client_keeps_the_models_parked(own_daemon):
    daemon = own_daemon(2, module=FAULTY)
    daemon.client().load("shapes")
    stubborn = "trap '' TERM; echo $$; while :; do sleep 0.1; done"
    client = daemon.popen("run", "--", "sh", "-c", stubborn, stdout=subprocess.PIPE)
    pid = int(client.stdout.readline())
    crowd = {"pid": pid, "name": "sh", "bytes": 18_000_000}
    daemon.inject({"crowd": crowd, "total": 20_000_000})
    client.kill()
    try:
        time.sleep(1.0)
        assert psutil.pid_exists(pid), "it takes no notice of its client's death"
        assert daemon.states() == ["parked", "parked"]
    finally:
        os.kill(pid, signal.SIGKILL)
        client.wait()
    daemon.inject()
    daemon.wait_for(lambda status: states(status) == ["loaded", "loaded"])
    assert not daemon.client().status()["leases"]


def test_a_program_that_keeps_the_memory_is_named_and_outlasted(own_daemon):
    daemon = own_daemon(2, module=FAULTY)
    client = daemon.client()
    client.load("shapes")
    keeper = subprocess.Popen(["sleep", "60"])
    crowd = {"pid": keeper.pid, "name": "sleep", "bytes": 18_000_000}
    lease = client.ask(LeaseAcquire())["lease"]
    daemon.inject({"crowd": crowd, "total": 20_000_000})
    with pytest.raises(GpuctlError, match=f"pid {keeper.pid} sleep") as refused:
        client.ask(LeaseRelease(lease=lease["id"], wait_s=0.5))
    assert refused.value.code == "device_memory"
    assert daemon.states() == ["parked", "parked"], "never half of them"
    told = daemon.cli("reload", check=5)
    assert f"pid {keeper.pid} sleep (17 MiB)" in told.stderr + told.stdout
    waiting = daemon.popen("reload", "--wait", "30s", stdout=subprocess.DEVNULL)
    time.sleep(1.0)
    assert waiting.poll() is None
    keeper.kill()
    keeper.wait()
    daemon.inject()
    assert waiting.wait(10) == 0
    assert daemon.states() == ["loaded", "loaded"]


def test_what_fails_before_the_start_is_told_apart_from_the_command(own_daemon, tmp_path):
    daemon = own_daemon(1, module=FAULTY)
    daemon.client().load("shapes")
    daemon.inject({"command": "UnloadModel", "raise": "it broke"})
    mark = tmp_path / "ran"
    done = daemon.cli("run", "--", "touch", str(mark), check=125)
    assert "it broke; the command was not started" in done.stderr
    assert not mark.exists()
    daemon.inject()
    assert daemon.wait_for(lambda status: not status["leases"])
    assert daemon.states() == ["loaded"]


@pytest.mark.parametrize("options", [[], ["--need", "1MiB"], ["--need", "1MiB", "--wait", "20s"]])
def test_a_worker_that_dies_while_the_gpus_are_emptied_has_freed_its_own(
    own_daemon, tmp_path, options
):
    daemon = own_daemon(2, module=FAULTY)
    daemon.client().load("shapes")
    daemon.inject({"command": "UnloadModel", "gpu": 0, "die": True})
    mark = tmp_path / "ran"
    daemon.cli("run", *options, "--", "sh", "-c", f"touch {mark}; exit 7", check=7)
    assert mark.exists()
    daemon.inject()
    assert daemon.states() == ["loaded", "loaded"]


def test_a_worker_that_dies_at_the_reload_brings_its_model_before_the_answer(own_daemon):
    daemon = own_daemon(2, module=FAULTY)
    daemon.client().load("shapes")
    daemon.inject({"command": "ReloadModel", "gpu": 0, "die": True})
    done = daemon.cli("run", "--", "sh", "-c", "exit 7", check=7)
    assert daemon.states() == ["loaded", "loaded"]
    assert "not back" not in done.stderr


def test_a_worker_that_hangs_while_the_gpus_are_emptied_is_replaced(own_daemon):
    daemon = own_daemon(2, module=FAULTY, more="[deadlines]\nunload = '1s'\n")
    daemon.client().load("shapes")
    daemon.inject({"command": "UnloadModel", "gpu": 0, "stop": True})
    daemon.cli("run", "--", "sh", "-c", "exit 7", check=7)
    assert daemon.states() == ["loaded", "loaded"]


def waiting_command(daemon, tmp_path):
    """``gpuctl run`` with a command that runs until it is let go: (client, its end)."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    client = daemon.popen(
        *("run", "--", "sh", "-c", f"echo $$; read word < {gate}; exit $word"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert client.stdout.readline()
    return client, gate


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lease_outlives_the_daemon_and_its_command_notices_nothing(own_daemon, tmp_path, number):
    daemon = own_daemon(2)
    daemon.client().load("shapes")
    client, gate = waiting_command(daemon, tmp_path)
    daemon.stop(number)
    daemon.start()
    status = daemon.client().status()
    [lease] = status["leases"]
    assert (lease["state"], lease["holder"]["pid"]) == ("held", client.pid)
    assert {worker["pid"] for worker in status["workers"]} == {0}, "nothing of ours on its GPUs"
    assert "waits for its GPU" in daemon.cli("status").stdout
    with pytest.raises(GpuctlError, match="leased to pid"):
        daemon.client().load("shapes")
    gate.write_text("7\n")
    _, told = client.communicate(timeout=30)
    assert client.returncode == 7
    assert "not back" not in told
    assert daemon.states() == ["loaded", "loaded"]


def test_a_command_that_ends_while_the_daemon_is_away_has_given_its_gpus_back(own_daemon, tmp_path):
    daemon = own_daemon(2)
    daemon.client().load("shapes")
    client, _ = waiting_command(daemon, tmp_path)
    daemon.stop(signal.SIGKILL)
    client.kill()
    client.communicate()
    daemon.start()
    daemon.wait_for(lambda status: states(status) == ["loaded", "loaded"])
    assert not daemon.client().status()["leases"]


def test_who_waits_for_a_lease_waits_on_when_the_daemon_restarts(own_daemon, tmp_path):
    daemon = own_daemon(1)
    daemon.client().load("shapes")
    first, gate = waiting_command(daemon, tmp_path)
    second = daemon.popen("run", "--wait", "60s", "--", "sh", "-c", "exit 5")
    daemon.wait_for(lambda status: len(status["leases"]) == 2)
    daemon.stop(signal.SIGKILL)
    daemon.start()
    daemon.wait_for(lambda status: len(status["leases"]) == 2)
    gate.write_text("0\n")
    assert first.wait(30) == 0
    first.communicate()
    assert second.wait(30) == 5
    assert daemon.states() == ["loaded"]
