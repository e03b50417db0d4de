"""LoRA adapters on a resident pipeline: each in a slab of its own beside the model's, never fused.

An unload copies nothing back. What changes the model's own weights would be lost with it, so an
adapter that does so is refused, and the model is as it was before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from gpuctl.errors import BadModel, BadRequest
from gpuctld.weights.movers import Mover


@attrs.define
class _Adapter:
    """``mover`` is ``None`` until the model comes to the device for the first time."""

    path: str
    scale: float
    mover: Mover | None = None


class Adapters:
    """The adapters of one pipeline, whose own weights ``model`` moves."""

    def __init__(self, pipeline: Any, model: Mover) -> None:
        self._pipeline, self._model = pipeline, model
        self._held: dict[str, _Adapter] = {}

    @property
    def device_bytes(self) -> int:
        """Of all adapters that have been loaded."""
        return sum(mover.device_bytes for mover in self._movers())

    @property
    def host_bytes(self) -> int:
        """The same, in host memory."""
        return sum(mover.host_bytes for mover in self._movers())

    def _movers(self) -> list[Mover]:
        return [each.mover for each in self._held.values() if each.mover is not None]

    def add(self, name: str, path: str, scale: float) -> None:
        """Load an adapter, or change the scale of one that is there; the model is on the device.

        Raises:
            BadRequest: the pipeline takes no adapters.
            BadModel: the file is missing, damaged, made for another model, or changes the model.
            OutOfMemory: the device has not enough.
        """
        if name not in self._held:
            mover = self._load(name, path)
            self._held[name] = _Adapter(path, scale, mover)
        self._held[name].scale = scale
        self._apply()

    def expect(self, name: str, path: str, scale: float) -> None:
        """Load an adapter when the model, parked now, comes to the device.

        Loading reads and may write the model's weights, which are not there while it is parked.
        """
        self._held[name] = _Adapter(path, scale)

    def _load(self, name: str, path: str) -> Mover:
        """Nothing is left of an adapter that cannot be loaded."""
        if not hasattr(self._pipeline, "load_lora_weights"):
            raise BadRequest(f"{type(self._pipeline).__name__} takes no adapters")
        if not Path(path).exists():
            raise BadModel(f"{path} is missing")
        model = _Model(self._pipeline)
        try:
            self._read(name, path)
            self._check(path, model)
            return self._model.adopt(f"adapter {name}", model.newcomers())
        except torch.AcceleratorError:  # may have poisoned the context: there is nothing to mend
            raise
        except BaseException:
            self._pipeline.delete_adapters(name)
            model.restore()
            self._mend()
            raise

    def _read(self, name: str, path: str) -> None:
        folder, file = (path, None) if Path(path).is_dir() else _split(path)
        try:
            self._pipeline.load_lora_weights(
                folder, weight_name=file, adapter_name=name, local_files_only=True
            )
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (ValueError, KeyError, OSError, RuntimeError) as wrong:
            raise BadModel(f"{path}: {wrong}".splitlines()[0]) from wrong

    def _check(self, path: str, model: _Model) -> None:
        if model.has_lost_tensors() or not self._model.is_intact():
            raise BadModel(
                f"{path} changes weights of the model itself; adapters are never fused",
                "use one of LoRA layers alone, or put a model with these weights in the catalog",
            )
        if not model.newcomers():
            raise BadModel(f"{path}: nothing in it is for this model")

    def _mend(self) -> None:
        """Take the model's own weights from the host copy again, if they were written to."""
        if not self._model.is_intact():
            self._model.park()
            self._model.bring(lambda *_: None, verify=False)

    def remove(self, name: str) -> None:
        """Take an adapter off, wherever the model is.

        Raises:
            BadRequest: it is not there.
        """
        if name not in self._held:
            raise BadRequest(f"no adapter {name!r} is loaded")
        mover = self._held.pop(name).mover
        if mover is not None:
            self._pipeline.delete_adapters(name)
            mover.close()
        self._apply()

    def _apply(self) -> None:
        loaded = {name: each.scale for name, each in self._held.items() if each.mover is not None}
        if loaded:
            self._pipeline.set_adapters(list(loaded), list(loaded.values()))

    def list(self) -> list[dict[str, Any]]:
        """``name`` and ``scale`` of each."""
        return [{"name": name, "scale": each.scale} for name, each in self._held.items()]

    def park(self) -> None:
        """Give their device memory back."""
        for mover in self._movers():
            mover.park()

    def bring(self, *, verify: bool) -> None:
        """Bring them to the device, where the model is already.

        After a failure some are there and some are not: park.

        Raises:
            OutOfMemory: the device has not enough.
            Corrupt: ``verify`` found other bytes.
            BadModel: one that was expected cannot be loaded.
        """
        for mover in self._movers():
            mover.bring(lambda *_: None, verify=verify)
        for name, adapter in self._held.items():
            if adapter.mover is None:
                adapter.mover = self._load(name, adapter.path)
                self._apply()

    def pause(self) -> None:
        """Unpin their host copies."""
        for mover in self._movers():
            mover.pause()

    def resume(self) -> None:
        """Pin them again, in the background."""
        for mover in self._movers():
            mover.resume()

    def close(self) -> None:
        """Give everything back; the pipeline is not used any more."""
        for mover in self._movers():
            mover.close()
        self._held.clear()


class _Model:
    """What a pipeline consisted of before an adapter came.

    Some files do more than add layers: those of FLUX's control adapters overwrite norms and put
    wider layers in the place of the model's.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._tensors = {id(tensor): tensor for tensor in _tensors(pipeline)}
        self._children = [
            (module, dict(module._modules))  # noqa: SLF001  the module tree
            for component in _components(pipeline)
            for module in component.modules()
        ]
        self._configs = [
            (component, copy.copy(component._internal_dict))  # noqa: SLF001  diffusers' own
            for component in _components(pipeline)
            if hasattr(component, "_internal_dict")
        ]

    def newcomers(self) -> list[torch.Tensor]:
        """Tensors that are there now and were not before."""
        return [each for each in _tensors(self._pipeline) if id(each) not in self._tensors]

    def has_lost_tensors(self) -> bool:
        """Whether any that were there before are not there now."""
        return not self._tensors.keys() <= {id(each) for each in _tensors(self._pipeline)}

    def restore(self) -> None:
        """Put the modules and configurations back that were there; not the tensors' values."""
        for module, children in self._children:
            module._modules = children  # noqa: SLF001
        for component, config in self._configs:
            component._internal_dict = config  # noqa: SLF001


def _components(pipeline: Any) -> list[torch.nn.Module]:
    every = pipeline.components.values()
    return [component for component in every if isinstance(component, torch.nn.Module)]


def _tensors(pipeline: Any) -> Iterator[torch.Tensor]:
    for component in _components(pipeline):
        yield from component.parameters()
        yield from component.buffers()


def _split(path: str) -> tuple[str, str]:
    return str(Path(path).parent), Path(path).name
