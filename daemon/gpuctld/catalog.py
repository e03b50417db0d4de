"""The catalog: which models clients may name, and what each one needs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from gpuctl.errors import BadModel, UnknownModel
from gpuctld.config import AdapterConfig, Config, ModelConfig


@attrs.frozen(kw_only=True)
class Model:
    """One catalogued model; ``path`` is absolute."""

    name: str
    path: str
    dtype: str | None
    variant: str | None
    pipeline: str | None
    defaults: dict[str, Any]
    devices: list[int] | None
    keep_alive: float | None
    verify: bool
    adapters: dict[str, AdapterConfig]
    estimated_bytes: int = 0

    def source(self) -> dict[str, Any]:
        """What a worker needs to read the model from disk."""
        return {
            "name": self.name,
            "path": self.path,
            "dtype": self.dtype,
            "variant": self.variant,
            "pipeline": self.pipeline,
        }

    def pipeline_class(self) -> str:
        """The pipeline's class name: configured, or what ``model_index.json`` says.

        Raises:
            BadModel: the index is missing or damaged.
        """
        return self.pipeline or _class_in_index(Path(self.path) / "model_index.json")


def _class_in_index(index: Path) -> str:
    try:
        return str(json.loads(index.read_text())["_class_name"])
    except FileNotFoundError:
        raise BadModel(f"{index}: no such file", "is the path a diffusers folder?") from None
    except (OSError, ValueError, KeyError, TypeError) as damaged:
        raise BadModel(f"{index}: {type(damaged).__name__}: {damaged}") from None


@attrs.frozen
class Catalog:
    """All models by name."""

    models: dict[str, Model]

    def __getitem__(self, name: str) -> Model:
        """The model called ``name``.

        Raises:
            UnknownModel: with the closest known name.
        """
        if name not in self.models:
            raise UnknownModel(f"no model {name!r} in the catalog", self._suggest(name))
        return self.models[name]

    def __contains__(self, name: object) -> bool:
        return name in self.models

    def __iter__(self) -> Iterator[Model]:
        return iter(self.models.values())

    def _suggest(self, name: str) -> str:
        close = difflib.get_close_matches(name, self.models, n=1)
        if close:
            return f"did you mean {close[0]!r}?"
        return f"known: {', '.join(self.models) or 'none; add [models.NAME] to the configuration'}"


def from_config(config: Config) -> Catalog:
    """Build the catalog; relative paths count from the configuration file."""
    return Catalog({name: _model(name, m, config.base_dir) for name, m in config.models.items()})


def _model(name: str, entry: ModelConfig, base: Path) -> Model:
    fields = attrs.asdict(entry, recurse=False)
    fields["path"] = _absolute(entry.path, base)
    fields["adapters"] = {
        key: attrs.evolve(adapter, path=_absolute(adapter.path, base))
        for key, adapter in entry.adapters.items()
    }
    return Model(name=name, **fields)


def _absolute(path: str, base: Path) -> str:
    return str((base / Path(path).expanduser()).resolve())
