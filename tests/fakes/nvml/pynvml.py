"""Stands in for NVML where it shall be slow, hang or end: what it does is in a file."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

NVML_SUCCESS = 0
NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230
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


def nvmlDeviceGetFieldValues(gpu, fields):  # noqa: N802
    """The driver asks for a reset while 13 bytes are in use; with 14 it knows no such field."""
    used = int(FAULT.read_text())
    value = SimpleNamespace(uiVal=1 if used == 13 else 0)
    return [SimpleNamespace(nvmlReturn=int(used == 14), value=value) for _ in fields]
