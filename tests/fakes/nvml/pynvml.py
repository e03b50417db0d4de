"""Stands in for NVML where it shall be slow, hang or end: what it does is in a file."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

FAULT = Path(os.environ.get("GPUCTL_TEST_NVML", ""))


def nvmlInit():  # noqa: N802  the library's names
    pass


def nvmlDeviceGetHandleByUUID(uuid):  # noqa: N802
    return uuid


def nvmlDeviceGetMemoryInfo(gpu):  # noqa: N802
    used = int(FAULT.read_text())
    if used < 0:
        os._exit(1)
    while FAULT.read_text() == "0":
        time.sleep(0.02)
    return SimpleNamespace(total=1000, used=used, free=1000 - used)


def nvmlDeviceGetComputeRunningProcesses(gpu):  # noqa: N802
    return [
        SimpleNamespace(pid=os.getppid(), usedGpuMemory=7),
        SimpleNamespace(pid=1, usedGpuMemory=3),
    ]
