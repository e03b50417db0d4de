"""The arms of benchmarks/weights.py: each runs in a process of its own and owns its GPUs."""

from __future__ import annotations

import gc
import os
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import flux_sized
from gpuctld import weights
from gpuctld.weights import Layout, Resident, skeleton
from gpuctld.weights.rendezvous import Listener, Meeting
from gpuctld.weights.segment import Segment

DEVICE = torch.device("cuda:0")


def silent(done: int, total: int) -> None:
    """Nobody watches."""


def used_bytes(device: int = 0) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def serve(arm: type, gpus: str, channel: Connection, *arguments: Any) -> None:
    """The process's main: call the arm's methods by name and send back what they return."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    try:
        made = arm(*arguments)
        while True:
            name, keywords = channel.recv()
            if name == "leave":
                break
            channel.send(getattr(made, name)(**keywords))
    except Exception:  # noqa: BLE001  the parent prints it and ends the run
        channel.send({"error": traceback.format_exc()})


class Slabs:
    """Ours: one worker with one GPU."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self._listener = Listener(path)
        uuid = f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"
        self._gauge = weights.gauge(DEVICE, uuid)
        self._context = weights.context(DEVICE)
        torch.zeros(1, device=DEVICE)
        self._context_bytes = used_bytes()
        self._resident: Resident
        self._expected: torch.Tensor | None = None

    def build(self, scale: float) -> dict[str, Any]:
        return flux_sized.build(self._descriptor, scale, DEVICE).to_map()

    def attach(self, layout: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        made = Layout.from_map(layout)
        self._resident = weights.attach(made, self._descriptor, DEVICE, self._gauge, silent)
        attached = time.perf_counter() - started
        self._resident._mover._transfer._pins.wait()  # noqa: SLF001  to time it
        return {"attach_s": attached, "pinned_s": time.perf_counter() - started}

    def unload(self) -> dict[str, Any]:
        before = used_bytes()
        freed = self._resident.unload()
        return {
            "freed": freed.freed_bytes,
            "device_freed": before - used_bytes(),
            "residual": freed.residual_bytes,
            "seconds": freed.duration_s,
        }

    def reload(
        self, token: str = "", rank: int = 0, paths: tuple[str, ...] = (), verify: bool = False
    ) -> dict[str, Any]:
        meeting = None
        if paths:
            meeting = Meeting(token=token, rank=rank, paths=list(paths), listener=self._listener)
        done = self._resident.reload(silent, verify=verify, meeting=meeting)
        return {"seconds": done.duration_s, "path": done.path}

    def forward(self) -> dict[str, Any]:
        """One step of the transformer at 1024 x 1024; whether the output is the first one's."""
        started = time.perf_counter()
        result = flux_sized.forward(self._resident.pipeline.transformer, DEVICE)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if self._expected is None:
            self._expected = result.clone()
        return {"seconds": seconds, "equal": bool(torch.equal(result, self._expected))}

    def floor(self) -> dict[str, Any]:
        """The bytes of the model from pinned memory into mapped memory, nothing else."""
        from gpuctld.weights import driver  # noqa: PLC0415

        mover = self._resident._mover  # noqa: SLF001  measured below everything that is public
        source, target = mover._source, mover._memory.address  # noqa: SLF001
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for at in range(0, source.numel(), 256 << 20):
            size = min(256 << 20, source.numel() - at)
            driver.copy_async(target + at, source.data_ptr() + at, size, stream.cuda_stream)
        stream.synchronize()
        return {"seconds": time.perf_counter() - started}

    def pins(self, on: bool) -> float:
        started = time.perf_counter()
        if on:
            self._resident.restore_pins()
            self._resident._mover._transfer._pins.wait()  # noqa: SLF001
        else:
            self._resident.release_pins()
        return time.perf_counter() - started

    def suspend(self) -> None:
        self._context.suspend()

    def wake(self) -> None:
        self._context.wake()

    def memory(self) -> dict[str, int]:
        return {"used": used_bytes(), "context": self._context_bytes}

    def churn(self, seconds: float, what: str) -> int:
        """What a neighbour has to live with, again and again for a while."""
        until, turns = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            if what == "idle":
                time.sleep(0.1)
            elif what == "pins":
                self.pins(on=False)
                self.pins(on=True)
            else:
                self.unload()
                self.reload()
            turns += 1
        return turns

    def steps(self, seconds: float) -> list[float]:
        """Milliseconds of a short step, again and again."""
        data = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
        until, taken = time.monotonic() + seconds, []
        while time.monotonic() < until:
            started = time.perf_counter()
            torch.mm(torch.mm(data, data), data)
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - started) * 1e3)
        return taken


class ModuleTo:
    """What users do today: ``pipeline.to()``, one thread per GPU that this process sees."""

    def __init__(self, descriptor: int, layout: dict[str, Any]) -> None:
        made = Layout.from_map(layout)
        segment = Segment(descriptor, made.slab_bytes)
        self._pipelines = [
            skeleton.assemble(segment.skeleton(made), segment.entries(made), segment.slab)
            for _ in range(torch.cuda.device_count())
        ]
        self._context = weights.context(DEVICE)

    def unload(self) -> dict[str, Any]:
        return self._on_all(lambda pipeline, _: pipeline.to("cpu"))

    def reload(self) -> dict[str, Any]:
        return self._on_all(lambda pipeline, gpu: pipeline.to(f"cuda:{gpu}"))

    def _on_all(self, move: Callable[[Any, int], Any]) -> dict[str, Any]:
        started = time.perf_counter()
        threads = [
            threading.Thread(target=move, args=(pipeline, gpu))
            for gpu, pipeline in enumerate(self._pipelines)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for gpu in range(len(self._pipelines)):
            torch.cuda.synchronize(gpu)
        gc.collect()
        torch.cuda.empty_cache()
        return {"seconds": time.perf_counter() - started}

    def suspend(self) -> None:
        self._context.suspend()

    def wake(self) -> None:
        self._context.wake()


class Saver:
    """torch_memory_saver with its backup in host memory; as many bytes as the model has."""

    def __init__(self, size: int) -> None:
        import torch_memory_saver  # noqa: PLC0415  only where it is installed

        self._saver = torch_memory_saver.torch_memory_saver
        self._saver.hook_mode = "torch"
        with self._saver.region(tag="weights", enable_cpu_backup=True):
            self._tensors = [
                torch.randint(0, 255, (size // 800,), dtype=torch.uint8, device=DEVICE)
                for _ in range(800)
            ]
        torch.cuda.synchronize()

    def unload(self) -> dict[str, Any]:
        return self._timed(self._saver.pause)

    def reload(self) -> dict[str, Any]:
        return self._timed(self._saver.resume)

    def _timed(self, call: Callable[[str], None]) -> dict[str, Any]:
        started = time.perf_counter()
        call("weights")
        torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - started}
