"""A worker that misbehaves on request.

Before each command it reads the JSON file that $GPUCTL_TEST_FAULTS names: a list of
``{"command": "UnloadModel", "gpu": 1, "delay_s": 2, "raise": "...", "die": true, "stop": true}``.
``"poison": true`` has a kernel fail on the GPU, after which nothing works in the process any more.
``{"crowd": {"pid": 7, "name": "trainer", "bytes": 18000000}, "total": 20000000}`` has every device
look as if it had ``total`` bytes and another process held some of them.

Beside that file a journal notes the seed of every job that is begun.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import torch

from gpuctld.messages import RunJob
from gpuctld.supervisor import WorkerSpec
from gpuctld.weights.gauge import CpuGauge
from gpuctld.worker import main as worker_main


class FaultyWorker(worker_main.Worker):
    """Does what the faults say before it does what it is told."""

    def _execute(self, command, blobs) -> None:
        if isinstance(command, RunJob):
            _note(command.seed)
        for fault in self._faults(type(command).__name__):
            time.sleep(fault.get("delay_s", 0))
            if fault.get("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.get("stop"):
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault.get("poison"):
                self._handlers[type(command)] = _poison
            elif "raise" in fault:
                self._handlers[type(command)] = _raiser(fault["raise"])
            else:
                self._handlers[type(command)] = self._originals[type(command)]
        super()._execute(command, blobs)
        self._handlers.update(self._originals)

    def __init__(self, spec: WorkerSpec, channel: socket.socket) -> None:
        super().__init__(spec, channel)
        self._originals = dict(self._handlers)

    def _faults(self, command: str) -> list[dict]:
        faults = json.loads(Path(os.environ["GPUCTL_TEST_FAULTS"]).read_text())
        here = {None, self._spec.device.gpu}
        return [f for f in faults if f.get("command") == command and f.get("gpu") in here]


class CrowdedGauge(CpuGauge):
    """Shows another program's memory where the faults say so."""

    def memory(self) -> dict[str, int]:
        crowd = _crowd()
        if crowd is None:
            return super().memory()
        total, used = crowd["total"], crowd["crowd"]["bytes"]
        return {"total": total, "used": used, "free": total - used}

    def foreign(self) -> list[dict]:
        crowd = _crowd()
        return [crowd["crowd"]] if crowd else []


def _note(seed: int) -> None:
    """One write, so that neither another worker nor a SIGKILL can cut the line."""
    faults = Path(os.environ["GPUCTL_TEST_FAULTS"]).resolve()
    journal = os.open(faults.with_name("journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(journal, f"{seed}\n".encode())
    os.close(journal)


def _crowd() -> dict | None:
    faults = json.loads(Path(os.environ["GPUCTL_TEST_FAULTS"]).read_text())
    return next((fault for fault in faults if "crowd" in fault), None)


def _poison(*_: object) -> None:
    """An assertion of torch's indexing kernel fails on the device: the context is lost."""
    torch.zeros(1, device="cuda")[torch.ones(1, dtype=torch.long, device="cuda")]
    torch.cuda.synchronize()


def _raiser(message: str):
    def fail(*_: object) -> None:
        raise RuntimeError(message)

    return fail


def faulty_main(spec: WorkerSpec, channel: socket.socket) -> None:
    """Entry point of a worker."""
    worker_main.Worker = FaultyWorker
    worker_main.weights.gauge = lambda device, uuid: CrowdedGauge()
    worker_main.main(spec, channel)
