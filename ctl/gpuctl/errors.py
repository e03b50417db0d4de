"""Every error that gpuctl knows, one stable code per class.

::

    GpuctlError                 error            exit 1
    ├── BadRequest              bad_request           2   the request itself is wrong
    │   └── BadConfig           bad_config            2   (the daemon leaves with 78, EX_CONFIG)
    ├── NoDaemon                no_daemon             3   nobody listens on the socket
    ├── Partial                 partial               4   some workers did it, some did not
    ├── DeviceMemory            device_memory         5   it does not fit beside what holds the GPU
    │   └── OutOfMemory         out_of_memory         5   CUDA ran out of memory during the work
    ├── HostMemory              host_memory           6   the host store's budget refuses
    ├── Busy                    busy                  7   someone else is at it
    │   ├── ModelParked         model_parked          7   the weights are in host memory
    │   ├── QueueFull           queue_full            7
    │   └── Leased              leased                7   the GPU is handed to another program
    ├── UnknownModel            unknown_model         8
    ├── UnknownGpu              unknown_gpu           8
    ├── Timeout                 timeout             124
    ├── Cancelled               cancelled           130
    ├── SuspendRefused          suspend_refused       1   the driver keeps the CUDA context
    ├── BadModel                bad_model             1   missing, damaged or refused model files
    ├── WorkerLost              worker_lost           1   the worker's process ended meanwhile
    ├── WorkerFailed            worker_failed         1   the worker is out of its restart budget
    ├── GpuFault                gpu_fault             1   a sticky CUDA error: worker replaced
    └── Corrupt                 corrupt               1   a checksum of weights does not match

The code travels on the wire and never changes; the exit status is what ``gpuctl`` leaves with.
Drawn as a tree in the docstring after httpx's ``_exceptions.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar


class GpuctlError(Exception):
    """Something that gpuctl can name.

    ``hint`` says what to do about it, or is empty. ``reply``: the daemon's whole answer, where
    the error came with one.
    """

    reply: Any = None
    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def to_map(self) -> dict[str, Any]:
        """The wire form: ``{"code", "message", "hint"}``."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class BadRequest(GpuctlError):
    """The request is malformed or asks for something that does not exist."""

    code = "bad_request"
    exit_status = 2


class BadConfig(BadRequest):
    """The configuration file is wrong; the message names the file and the line."""

    code = "bad_config"


class NoDaemon(GpuctlError):
    """Nobody answers on the socket."""

    code = "no_daemon"
    exit_status = 3


class Partial(GpuctlError):
    """Some workers did what was asked and some did not; the rows say which."""

    code = "partial"
    exit_status = 4


class DeviceMemory(GpuctlError):
    """The model does not fit beside what already holds the GPU."""

    code = "device_memory"
    exit_status = 5


class OutOfMemory(DeviceMemory):
    """The GPU ran out of memory during the work; the worker is kept."""

    code = "out_of_memory"


class HostMemory(GpuctlError):
    """The host store's budget refuses the model before the kernel kills somebody."""

    code = "host_memory"
    exit_status = 6


class Busy(GpuctlError):
    """Another operation or program is at it."""

    code = "busy"
    exit_status = 7


class ModelParked(Busy):
    """The job's model is in host memory and the caller chose not to wait."""

    code = "model_parked"


class QueueFull(Busy):
    """The job queue is at its bound."""

    code = "queue_full"


class Leased(Busy):
    """The GPU is handed to another program until its lease ends."""

    code = "leased"


class UnknownModel(GpuctlError):
    """The catalog has no such model."""

    code = "unknown_model"
    exit_status = 8


class UnknownGpu(GpuctlError):
    """The daemon owns no such GPU."""

    code = "unknown_gpu"
    exit_status = 8


class Timeout(GpuctlError):
    """It took longer than the caller or the daemon allows."""

    code = "timeout"
    exit_status = 124


class Cancelled(GpuctlError):
    """Somebody cancelled it."""

    code = "cancelled"
    exit_status = 130


class SuspendRefused(GpuctlError):
    """The driver does not give the CUDA context back: too old, or it says why."""

    code = "suspend_refused"


class BadModel(GpuctlError):
    """The model's files are missing, damaged or not allowed; the message names the file."""

    code = "bad_model"


class WorkerLost(GpuctlError):
    """The worker's process ended while it worked on the request."""

    code = "worker_lost"


class WorkerFailed(GpuctlError):
    """The worker is down and out of its restart budget."""

    code = "worker_failed"


class GpuFault(GpuctlError):
    """A sticky CUDA error: the context is lost and the worker is replaced."""

    code = "gpu_fault"


class Corrupt(GpuctlError):
    """Weights on the device differ from those that were loaded."""

    code = "corrupt"


def _tree(cls: type[GpuctlError]) -> list[type[GpuctlError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _tree(child))]


BY_CODE: dict[str, type[GpuctlError]] = {cls.code: cls for cls in _tree(GpuctlError)}


def from_map(error: dict[str, Any]) -> GpuctlError:
    """The exception for a wire error; an unknown code becomes a plain :class:`GpuctlError`."""
    cls = BY_CODE.get(str(error.get("code")), GpuctlError)
    return cls(str(error.get("message", "")), str(error.get("hint", "")))
