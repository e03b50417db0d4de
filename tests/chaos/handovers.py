"""Programs that have the GPUs on a lease die without a word, or the daemon does under them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gpuctl import keys
from tests.chaos.arena import Arena, runs
from tests.chaos.crowd import MODEL
from tests.chaos.trial import Trial
from tests.integration.fork_servers import ForkServers

POLL_S = 0.01
FREED_S = 10.0
STARTED_S = 10.0
UP_TO_S = 0.6
"""From before the lease is asked for until the command has run for a while."""
TTL_S = 2.0
CLIENT_TOO = 0.25

HOLDER = f"""
import sys, time
from gpuctl import Client
client = Client(sys.argv[1])
with client.lease(ttl_s={TTL_S}):
    print("held", flush=True)
    time.sleep(60)
"""


def lease_kills(trial: Trial, count: int) -> list[float]:
    """kill -9 of `gpuctl run`, its command or both, at any moment; seconds to the lease's end."""
    files = sorted(trial.arena.daemon.home.iterdir())
    took = [_kill_run(trial) for _ in range(count)]
    left = sorted(set(trial.arena.daemon.home.iterdir()) - set(files))
    trial.wrongs += [f"{path} is left" for path in left if path.name != "command"]
    return took


def _start_run(trial: Trial) -> tuple[subprocess.Popen[str], Path]:
    """`gpuctl run`, and the file that names its command's process once that runs."""
    mark = trial.arena.daemon.home / "command"
    mark.unlink(missing_ok=True)
    script = f"echo $$ > {mark}.new; mv {mark}.new {mark}; exec sleep 60"
    client = trial.arena.daemon.popen("run", "--", "sh", "-c", script, stderr=subprocess.DEVNULL)
    return client, mark


def _kill_run(trial: Trial) -> float:
    client, mark = _start_run(trial)
    victims = trial.dice.choice(["client", "command", "both"])
    time.sleep(trial.dice.uniform(0, UP_TO_S))
    if victims == "command":
        _wait(mark.exists, STARTED_S)
    if victims != "client" and mark.exists():
        os.kill(int(mark.read_text()), signal.SIGKILL)
    if victims != "command":
        client.kill()
    took = _until_free(trial)
    client.wait(STARTED_S)
    _expect_end(trial, mark, victims)
    return took


def _expect_end(trial: Trial, mark: Path, cause: str) -> None:
    if mark.exists() and not _wait(lambda: not runs(int(mark.read_text())), FREED_S):
        trial.wrongs.append(f"the command outlived its {cause}")


def _until_free(trial: Trial) -> float:
    """Seconds until no lease is left; then the models must be back."""
    began = time.monotonic()
    with trial.arena.daemon.client() as client:
        freed = _wait(lambda: not client.status()["leases"], FREED_S)
    took = time.monotonic() - began
    if not freed or set(trial.arena.daemon.states(MODEL)) != {"loaded"}:
        states = trial.arena.daemon.states(MODEL)
        trial.wrongs.append(f"after {took:.1f} s the lease is there or models are {states}")
    return took


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def daemon_kills(trial: Trial, count: int) -> list[float]:
    """kill -9 of the daemon under `gpuctl run`, at any moment; sometimes its client dies as well.

    Where the command runs it goes on, and the next daemon knows of its lease. Seconds from the
    SIGTERM that then ends it until the models are back.
    """
    return [_kill_daemon(trial) for _ in range(count)]


def _kill_daemon(trial: Trial) -> float:
    client, mark = _start_run(trial)
    time.sleep(trial.dice.uniform(0, UP_TO_S))
    trial.arena.daemon.stop(signal.SIGKILL)
    if trial.dice.random() < CLIENT_TOO:
        client.kill()
        client.wait()
    granted = mark.exists()
    trial.arena.start()
    held = [each["state"] for each in trial.arena.daemon.client().status()["leases"]]
    if granted and client.poll() is None and held != ["held"]:
        trial.wrongs.append(f"a lease is lost: {held}")
    began = time.monotonic()
    client.terminate()
    _expect_back(trial)
    took = time.monotonic() - began
    client.wait(STARTED_S)
    _expect_end(trial, mark, "client")
    return took


def _expect_back(trial: Trial) -> None:
    """Wait until no lease is left and the models are loaded."""
    daemon = trial.arena.daemon
    with daemon.client() as client:
        free = _wait(lambda: not client.status()["leases"], FREED_S)
    if not free or not _wait(lambda: set(daemon.states(MODEL)) == {"loaded"}, FREED_S):
        trial.wrongs.append(f"the lease is there or models are {daemon.states(MODEL)}")


# --- from another machine -------------------------------------------------------------------


class RemoteArena(Arena):
    """A daemon that listens on TCP as well, and a client of it that has a key."""

    def __init__(self, home: Path, fork_servers: ForkServers, silence_s: float | None) -> None:
        self._settings = home.with_name("settings")
        server, client = (
            keys.new(name, {"XDG_CONFIG_HOME": str(self._settings)})
            for name in ("server", "client")
        )
        self._server_key = server.public.decode()
        self._address = f"127.0.0.1:{_free_port()}"
        more = f'[tcp]\nlisten = "{self._address}"\nkey = "{server.file}"\n'
        more += f'[tcp.clients]\nme = "{client.public.decode()}"\n'
        super().__init__(home, fork_servers, silence_s, more=more)

    def holder(self) -> subprocess.Popen[str]:
        """A program with a lease over TCP."""
        environ = {
            **self.daemon.environ,
            "XDG_CONFIG_HOME": str(self._settings),
            "GPUCTL_SERVER_KEY": self._server_key,
        }
        words = [sys.executable, "-c", HOLDER, f"tcp://{self._address}"]
        made = subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True)
        made.stdout.readline()
        return made


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def remote_lease_kills(trial: Trial, count: int) -> list[float]:
    """kill -9 of a client whose lease over TCP has 2 s to live; seconds to the lease's end."""
    return [_kill_remote(trial) for _ in range(count)]


def _kill_remote(trial: Trial) -> float:
    holder = trial.arena.holder()
    if not trial.arena.daemon.client().status()["leases"]:
        trial.wrongs.append("no lease over TCP")
    time.sleep(trial.dice.uniform(0, UP_TO_S))
    holder.kill()
    holder.wait()
    return _until_free(trial)
