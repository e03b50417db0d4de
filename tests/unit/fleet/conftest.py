"""A fleet driven by hand: events in, effects out, and time that only the test moves."""

from __future__ import annotations

from typing import Any

import pytest

from gpuctl.protocol import Request
from gpuctld import catalog, config
from gpuctld.devices import Device
from gpuctld.fleet import Fleet, effects, events
from gpuctld.fleet.events import Peer
from gpuctld.messages import (
    CancelTask,
    Done,
    Failed,
    Hello,
    LoadModel,
    Probe,
    Probed,
    ReloadModel,
    RunJob,
    UnloadModel,
)

GIB = 2**30
MODEL_BYTES = 4 * GIB
CONFIG = """
[daemon]
job_queue = 4
[models.flux]
path = "/models/flux"
[models.flux.defaults]
num_inference_steps = 4
[models.sd]
path = "/models/sd"
[models.sd.adapters.ink]
path = "/adapters/ink"
[phases.score]
loaded = []
[phases.draw]
loaded = ["flux"]
"""


class Bench:
    """A fleet on a test bench."""

    def __init__(self, workers: int = 2, text: str = CONFIG) -> None:
        settings = config.parse(text)
        crew = [Device(n, f"cuda:{n}", "cuda", f"GPU-{n}", "Test") for n in range(workers)]
        self.fleet = Fleet(settings, catalog.from_config(settings), crew)
        self.now = 1000.0
        self.effects: list[Any] = []
        self.sent: list[tuple[int, Any]] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.free = dict.fromkeys(range(workers), 80 * GIB)
        self.foreign: dict[int, list[dict[str, Any]]] = {}

    # --- what the outside does --------------------------------------------------------------

    def apply(self, event: events.Event) -> list[Any]:
        self.effects = self.fleet.apply(event, self.now)
        for effect in self.effects:
            if isinstance(effect, effects.Answer):
                assert effect.id not in self.answers, "a second terminal answer"
                self.answers[effect.id] = effect.reply
            if isinstance(effect, effects.Send):
                self.sent.append((effect.gpu, effect.command))
        return self.effects

    def ask(self, request: Request, client: bytes = b"c", pid: int = 7, blobs: Any = ()) -> str:
        peer = Peer(pid=pid, uid=1000)
        self.apply(events.Requested(request=request, client=client, peer=peer, blobs=blobs))
        return request.id

    def say(self, gpu: int, message: Any) -> None:
        self.apply(events.Heard(gpu, message))

    def hello(self, gpu: int) -> None:
        self.apply(events.Spawned(gpu, 100 + gpu))
        self.say(gpu, Hello(pid=100 + gpu, memory=self._memory(gpu)))

    def all_up(self) -> Bench:
        for gpu in self.fleet.state.workers:
            self.hello(gpu)
        return self

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.apply(events.Tick())

    def wait(self, seconds: float) -> None:
        """Let time pass with the workers beating."""
        for worker in self.fleet.state.workers.values():
            worker.heard_at = self.now + seconds
        self.tick(seconds)

    def silence(self, seconds: float) -> None:
        """Let time pass without a word from the workers; the last turn's effects stand."""
        self.now += seconds - 1
        self.fleet.state.watched_at = self.now
        self.tick(1)

    def die(self, gpu: int, reason: str = "killed by SIGKILL") -> None:
        self.sent = [(other, command) for other, command in self.sent if other != gpu]
        self.apply(events.Died(gpu, reason))

    # --- what the workers do ----------------------------------------------------------------

    def _memory(self, gpu: int) -> dict[str, int]:
        return {"total": 80 * GIB, "used": 80 * GIB - self.free[gpu], "free": self.free[gpu]}

    def take(self, *kinds: type) -> list[tuple[int, Any]]:
        """Commands sent since the last look, of these kinds."""
        found = [(gpu, command) for gpu, command in self.sent if isinstance(command, kinds)]
        self.sent = [each for each in self.sent if each not in found]
        return found

    def answer_probes(self) -> None:
        for gpu, probe in self.take(Probe):
            foreign = self.foreign.get(gpu, [])
            self.say(gpu, Probed(task=probe.task, memory=self._memory(gpu), foreign=foreign))

    def finish(self, gpu: int, command: Any) -> None:
        """The worker does what it was told."""
        result: dict[str, Any] = {"device_bytes": MODEL_BYTES, "host_bytes": MODEL_BYTES}
        if isinstance(command, LoadModel) and command.layout is None:
            result["layout"] = {"slab_bytes": MODEL_BYTES, "dtype": "bfloat16"}
        if isinstance(command, UnloadModel):
            result["freed_bytes"] = MODEL_BYTES
        if isinstance(command, RunJob):
            result = {"images": []}
        self.say(gpu, Done(task=command.task, result=result))

    def fail(self, gpu: int, command: Any, code: str = "error") -> None:
        error = {"code": code, "message": "it broke", "hint": ""}
        self.say(gpu, Failed(task=command.task, error=error))

    def work(self) -> list[tuple[int, Any]]:
        """All workers do all they are told, until nothing is left; what they did, in order."""
        done: list[tuple[int, Any]] = []
        while True:
            self.answer_probes()
            batch = self.take(LoadModel, UnloadModel, ReloadModel, RunJob)
            if not batch:
                return done
            for gpu, command in batch:
                self.finish(gpu, command)
                done.append((gpu, command))

    # --- what can be seen -------------------------------------------------------------------

    def state(self, gpu: int, model: str = "flux") -> str:
        return str(self.fleet.state.workers[gpu].state_of(model))

    def states(self, model: str = "flux") -> list[str]:
        return [self.state(gpu, model) for gpu in self.fleet.state.workers]

    def reply(self, id_: str) -> dict[str, Any]:
        return self.answers[id_]

    def cancelled(self) -> list[str]:
        return [command.task for _, command in self.take(CancelTask)]


@pytest.fixture
def bench() -> Bench:
    return Bench().all_up()


@pytest.fixture
def make_bench() -> type[Bench]:
    return Bench
