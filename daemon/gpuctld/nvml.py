"""Asks the driver about one GPU for somebody else: ``python -m gpuctld.nvml UUID``.

NVML can hang with its GPU, and in a process whose CUDA context is suspended its calls wait until
the context is back (measured with driver 580). So a process of its own asks: it reads lines
``memory``, ``processes`` and ``recovery`` and answers each with a line of JSON. It ends with its
standard input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

RECOVERY = {
    0: "",
    1: "a reset of the GPU",
    2: "a reboot of the node",
    3: "draining of its peer-to-peer traffic",
    4: "draining and a reset of the GPU",
}
"""nvmlDeviceGpuRecoveryAction_t in words."""


def main(uuid: str) -> None:
    """Serve until standard input ends."""
    import pynvml  # noqa: PLC0415  absent on machines without GPUs

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    answers: dict[str, Callable[[Any, Any], Any]] = {
        "memory": _memory,
        "processes": _processes,
        "recovery": _recovery,
    }
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answers[line.strip()](pynvml, gpu)) + "\n")
        sys.stdout.flush()


def _memory(pynvml: Any, gpu: Any) -> dict[str, int]:
    info = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    return {"total": int(info.total), "used": int(info.used), "free": int(info.free)}


def _processes(pynvml: Any, gpu: Any) -> list[list[int]]:
    found = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
    return [[each.pid, int(each.usedGpuMemory or 0)] for each in found]


def _recovery(pynvml: Any, gpu: Any) -> str:
    """Drivers before 570 do not know the field: no answer is no wish."""
    [found] = pynvml.nvmlDeviceGetFieldValues(gpu, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if found.nvmlReturn != pynvml.NVML_SUCCESS:
        return ""
    action = int(found.value.uiVal)
    return RECOVERY.get(action, f"recovery action {action}")


if __name__ == "__main__":
    main(sys.argv[1])
