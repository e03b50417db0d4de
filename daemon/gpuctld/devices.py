"""Which devices the daemon owns. Asks NVML, never CUDA: the controller has no context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from gpuctl.errors import BadConfig


@attrs.frozen
class Device:
    """One device and its number ``gpu``, the position in the daemon's list."""

    gpu: int
    name: str
    kind: str
    uuid: str = ""
    model_name: str = ""

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"


@attrs.frozen
class CudaGpu:
    """A GPU as NVML lists it, in PCI bus order."""

    index: int
    uuid: str
    name: str


def installed_gpus() -> list[CudaGpu]:
    """Every NVIDIA GPU of the machine; empty without driver or library."""
    try:
        import pynvml  # noqa: PLC0415  optional: absent on a machine without GPUs

        pynvml.nvmlInit()
    except (ImportError, OSError):
        return []
    except pynvml.NVMLError:
        return []
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    gpus = [
        CudaGpu(i, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle))
        for i, handle in enumerate(handles)
    ]
    pynvml.nvmlShutdown()
    return gpus


def visible_gpus(gpus: Sequence[CudaGpu], environ: Mapping[str, str]) -> list[CudaGpu]:
    """Those that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; all when it is not set."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(gpus)
    found = (_find(gpus, word.strip()) for word in chosen.split(",") if word.strip())
    return [gpu for gpu in found if gpu is not None]


def _find(gpus: Sequence[CudaGpu], word: str) -> CudaGpu | None:
    if word.isdigit():
        return next((gpu for gpu in gpus if gpu.index == int(word)), None)
    return next((gpu for gpu in gpus if gpu.uuid.startswith(word)), None)


def resolve(wanted: str | Sequence[str], gpus: Sequence[CudaGpu]) -> list[Device]:
    """Number the wanted devices from 0.

    Raises:
        BadConfig: a device that does not exist, or none at all.
    """
    names = _names(wanted, gpus)
    if not names:
        raise BadConfig("no CUDA GPU found", 'devices = ["cpu", "cpu"] runs without one')
    return [_device(number, name, gpus) for number, name in enumerate(names)]


def _names(wanted: str | Sequence[str], gpus: Sequence[CudaGpu]) -> Sequence[str]:
    if wanted == "auto":
        return [f"cuda:{gpu.index}" for gpu in gpus]
    return wanted.split(",") if isinstance(wanted, str) else wanted


def _device(number: int, name: str, gpus: Sequence[CudaGpu]) -> Device:
    if name == "cpu":
        return Device(number, "cpu", "cpu", model_name="CPU")
    gpu = _find(gpus, name.removeprefix("cuda:"))
    if gpu is None:
        known = ", ".join(f"cuda:{gpu.index}" for gpu in gpus) or "no CUDA GPU"
        raise BadConfig(f"no device {name!r}", f"this machine has {known}; cpu always works")
    return Device(number, f"cuda:{gpu.index}", "cuda", gpu.uuid, gpu.name)
