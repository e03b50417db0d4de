"""A real daemon for tests: own process, own socket, own state."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpuctl import Client, GpuctlError
from gpuctl_demo import GUIDANCE, IMAGE_GUIDANCE, STEPS, model_path
from tests.integration.fork_servers import ForkServers

START_S = 90.0
ROOT = Path(__file__).parents[2]
FAULTY = "tests.fakes.faulty_daemon"
CLI = [sys.executable, "-c", "from gpuctl.cli import main; main()"]
CONFIG = f"""
[daemon]
state_dir = "{{home}}/state"
[restart]
min = "100ms"
max = "1s"
[models.shapes]
path = "{model_path("shapes")}"
[models.shapes.defaults]
num_inference_steps = {STEPS}
guidance_scale = {GUIDANCE}
[models.shapes-edit]
path = "{model_path("shapes-edit")}"
[models.shapes-edit.defaults]
num_inference_steps = {STEPS}
guidance_scale = {GUIDANCE}
image_guidance_scale = {IMAGE_GUIDANCE}
"""


class Daemon:
    """``gpuctld`` on ``workers`` devices.

    ``module``: what to run, ours or one with faults. ``under``: a command that starts it.
    ``fork_servers``: where its workers come from; without, from a child of its own.
    """

    def __init__(
        self,
        home: Path,
        workers: int = 2,
        *,
        more: str = "",
        module: str = "gpuctld",
        device: str = "cpu",
        under: tuple[str, ...] = (),
        fork_servers: ForkServers | None = None,
    ) -> None:
        self.home = home
        self.endpoint = f"ipc://{home}/gpuctl.sock"
        self.config = home / "config.toml"
        self.config.write_text(CONFIG.format(home=home) + more)
        self.inject()
        self.command = [*under, sys.executable, "-m", module, "--config", str(self.config)]
        self.command += ["--socket", self.endpoint, "--devices", ",".join([device] * workers)]
        self._fork_servers = fork_servers
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environ(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("GPUCTL_")}
        return {
            **clean,
            "GPUCTL_SOCKET": self.endpoint,
            "GPUCTL_TEST_FAULTS": str(self.home / "faults.json"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }

    def inject(self, *faults: dict) -> None:
        """Have the workers of ``tests.fakes.faulty_worker`` misbehave from now on."""
        fresh = self.home / "faults.new"
        fresh.write_text(json.dumps(faults))
        fresh.replace(self.home / "faults.json")

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    def start(self) -> Daemon:
        self.process = self._launch()
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                if Client(self.endpoint, timeout=5).status()["daemon"]["ready"]:
                    return self
            except GpuctlError:
                time.sleep(0.1)
            assert self.process.poll() is None, self.log
        raise AssertionError(self.log)

    def _launch(self) -> subprocess.Popen[bytes]:
        command = [*self.command]
        lent = self._fork_servers.borrow(self.environ) if self._fork_servers else None
        if lent:
            command += ["--workers", str(lent.path)]
        with (self.home / "log").open("a") as log:
            made = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environ, start_new_session=True
            )
        if lent:
            lent.serve(made, self.home / "faults.json")
        return made

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def client(self, timeout: float = 60) -> Client:
        return Client(self.endpoint, timeout=timeout)

    def popen(self, *words: str, **options) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*CLI, *words],
            env=self.environ,
            text=True,
            preexec_fn=_hear_interrupts,  # noqa: PLW1509  no threads here that could hold locks
            **options,
        )

    def cli(self, *words: str, check: int | None = 0, **options) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [*CLI, *words],
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
            **options,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert check is None or done.returncode == check, done
        return done

    def worker_pids(self) -> list[int]:
        return [worker["pid"] for worker in self.client().status()["workers"]]

    def wait_for(self, condition, seconds: float = 20.0):
        """Until ``condition(status)`` holds; the status then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.client().status()
            if condition(status):
                return status
            time.sleep(0.05)
        raise AssertionError(f"not in {seconds} s: {self.client().status()}")

    def states(self, model: str = "shapes") -> list[str]:
        return states(self.client().status(), model)

    def draw(self, gpu: int, prompt: str = "a large red circle on white") -> bytes:
        """The pixels of a seeded picture from one worker."""
        [image] = self.client().generate("shapes", prompt, seed=5, options={"gpu": gpu})
        return image.tobytes()


def _hear_interrupts() -> None:
    """A test run in the background of a shell has inherited that ^C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def worker_states(status: dict) -> list[str]:
    """The state of each worker."""
    return [worker["state"] for worker in status["workers"]]


def states(status: dict, model: str = "shapes") -> list[str]:
    """The residency of a model on each worker."""
    return [
        next((held["state"] for held in worker["models"] if held["model"] == model), "absent")
        for worker in status["workers"]
    ]
