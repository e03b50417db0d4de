"""Asks the driver about one GPU for somebody else: ``python -m gpuctld.nvml UUID``.

NVML can hang with its GPU, and in a process whose CUDA context is suspended its calls wait until
the context is back (measured with driver 580). So a process of its own asks: it reads lines
``memory`` and ``processes`` and answers each with a line of JSON. It ends with its standard input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def main(uuid: str) -> None:
    """Serve until standard input ends."""
    import pynvml  # noqa: PLC0415  absent on machines without GPUs

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    answers: dict[str, Callable[[Any, Any], Any]] = {"memory": _memory, "processes": _processes}
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answers[line.strip()](pynvml, gpu)) + "\n")
        sys.stdout.flush()


def _memory(pynvml: Any, gpu: Any) -> dict[str, int]:
    info = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    return {"total": int(info.total), "used": int(info.used), "free": int(info.free)}


def _processes(pynvml: Any, gpu: Any) -> list[list[int]]:
    found = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
    return [[each.pid, int(each.usedGpuMemory or 0)] for each in found]


if __name__ == "__main__":
    main(sys.argv[1])
