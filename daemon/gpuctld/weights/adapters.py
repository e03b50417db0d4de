"""LoRA adapters on a resident pipeline: loaded beside the slab, moved with it, never fused.

Fusing would change the weights that an unload does not copy back, so adapters stay apart. Their
tensors are small; each keeps a host copy and comes back to the device after the slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpuctl.errors import BadModel, BadRequest


class Adapters:
    """Names and scales of the adapters that a pipeline carries, and their tensors."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self._pipeline, self._device = pipeline, device
        self._scales: dict[str, float] = {}
        self._tensors: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, path: str, scale: float) -> None:
        """Load an adapter, or change the scale of one that is there.

        Raises:
            BadRequest: the pipeline takes no adapters.
            BadModel: the file is missing, damaged or made for another model.
        """
        if not hasattr(self._pipeline, "load_lora_weights"):
            raise BadRequest(f"{type(self._pipeline).__name__} takes no adapters")
        if name not in self._scales:
            self._tensors[name] = self._load(name, path)
        self._scales[name] = scale
        self._apply()

    def _load(self, name: str, path: str) -> list[torch.Tensor]:
        if not Path(path).exists():
            raise BadModel(f"{path} is missing")
        before = {id(tensor) for tensor in self._all()}
        folder, file = (path, None) if Path(path).is_dir() else _split(path)
        try:
            self._pipeline.load_lora_weights(
                folder, weight_name=file, adapter_name=name, local_files_only=True
            )
        except (ValueError, KeyError, OSError, RuntimeError) as wrong:
            raise BadModel(f"{path}: {wrong}".splitlines()[0]) from wrong
        fresh = [tensor for tensor in self._all() if id(tensor) not in before]
        for tensor in fresh:
            tensor.data = tensor.data.to(self._device)
        return fresh

    def _all(self) -> Iterator[torch.Tensor]:
        for component in self._pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                yield from component.parameters()
                yield from component.buffers()

    def remove(self, name: str) -> None:
        """Take an adapter off.

        Raises:
            BadRequest: it is not there.
        """
        if name not in self._scales:
            raise BadRequest(f"no adapter {name!r} is loaded")
        self._pipeline.delete_adapters(name)
        del self._scales[name], self._tensors[name]
        self._apply()

    def _apply(self) -> None:
        if self._scales:
            self._pipeline.set_adapters(list(self._scales), list(self._scales.values()))

    def list(self) -> list[dict[str, Any]]:
        """``name`` and ``scale`` of each."""
        return [{"name": name, "scale": scale} for name, scale in self._scales.items()]

    def park(self) -> None:
        """Move the adapters' tensors to host memory."""
        self._move(torch.device("cpu"))

    def bring(self) -> None:
        """Move them back to the device."""
        self._move(self._device)

    def _move(self, device: torch.device) -> None:
        for tensors in self._tensors.values():
            for tensor in tensors:
                tensor.data = tensor.data.to(device)


def _split(path: str) -> tuple[str, str]:
    return str(Path(path).parent), Path(path).name
