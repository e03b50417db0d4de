"""Looks at a model folder before diffusers does: nothing outside it, no code, nothing missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpuctl.errors import BadModel

INDEX = "model_index.json"
HEADER_BYTES = 100 * 1024 * 1024
"""The safetensors library's own limit for a header."""


def check(path: Path) -> None:
    """Refuse folders that are damaged or hostile.

    Raises:
        BadModel: names the file and what is wrong with it.
    """
    index = read_index(path)
    for name, component in _components(index):
        if component[0] is not None:
            _check_component(path, name, component)
    for file in weight_files(path):
        header(file)


def read_index(path: Path) -> dict[str, Any]:
    """The folder's ``model_index.json``.

    Raises:
        BadModel: missing or not such an index.
    """
    file = path / INDEX
    try:
        index = json.loads(file.read_text())
    except FileNotFoundError:
        raise BadModel(f"{file} is missing", "is the path a diffusers folder?") from None
    except (OSError, ValueError) as damaged:
        raise BadModel(f"{file} is damaged: {damaged}") from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise BadModel(f"{file} names no pipeline class")
    return index


def _components(index: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2:
            yield name, value


def _check_component(path: Path, name: str, component: list[Any]) -> None:
    folder = path / name
    if Path(name).name != name or name in {".", ".."}:
        raise BadModel(f"{path / INDEX}: the component {name!r} leaves the folder")
    if component[0] not in {"diffusers", "transformers"}:
        raise BadModel(f"{path / INDEX}: the component {name!r} brings code of its own")
    if not folder.is_dir():
        raise BadModel(f"{folder} is missing")
    if not folder.resolve().is_relative_to(path.resolve()):
        raise BadModel(f"{folder} leads out of the model folder")
    if any(folder.glob("*.py")):
        raise BadModel(f"{folder} has Python files; code of a model is never run")
    _check_remote_code(folder / "config.json")
    _check_weights(folder)


def _check_remote_code(config: Path) -> None:
    if not config.exists():
        return
    try:
        fields = json.loads(config.read_text())
    except ValueError as damaged:
        raise BadModel(f"{config} is damaged: {damaged}") from None
    if isinstance(fields, dict) and "auto_map" in fields:
        raise BadModel(f"{config} asks for code of its own (auto_map)")


def _check_weights(folder: Path) -> None:
    if (folder / "config.json").exists() and not any(folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")]
        found = f"; {pickled[0].name} is a pickle" if pickled else ""
        raise BadModel(f"{folder} has no safetensors file{found}", "only safetensors are loaded")
    for index in folder.glob("*.safetensors.index*.json"):
        for shard in set(json.loads(index.read_text())["weight_map"].values()):
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise BadModel(f"{folder / shard} is missing, named by {index.name}")


def weight_files(path: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of all components; of a variant where one has it."""
    found: list[Path] = []
    for folder in sorted(each for each in path.iterdir() if each.is_dir()):
        files = sorted(folder.glob("*.safetensors"))
        plain = [file for file in files if file.name.count(".") == 1]
        special = [file for file in files if variant and f".{variant}." in file.name]
        found += special or plain or files
    return found


def header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name to ``dtype``, ``shape``, ``data_offsets``.

    Raises:
        BadModel: cut short or damaged.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > HEADER_BYTES:
                raise BadModel(f"{file} is damaged: a header of {length} bytes")
            fields = json.loads(stream.read(length))
    except OSError as unreadable:
        raise BadModel(f"{file} cannot be read: {unreadable.strerror}") from None
    except ValueError as damaged:
        raise BadModel(f"{file} is damaged: {damaged}") from None
    return _checked(file, fields, 8 + length)


def _checked(file: Path, fields: Any, start: int) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise BadModel(f"{file} is damaged: its header is no table")
    tensors = {name: each for name, each in fields.items() if name != "__metadata__"}
    try:
        end = max((int(each["data_offsets"][1]) for each in tensors.values()), default=0)
    except (KeyError, TypeError, IndexError, ValueError):
        raise BadModel(f"{file} is damaged: its header makes no sense") from None
    if file.stat().st_size < start + end:
        raise BadModel(f"{file} is cut short: {start + end} bytes expected")
    return tensors


_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_TARGETS = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


def estimate_bytes(path: Path, dtype: str | None, variant: str | None) -> int:
    """How many bytes the weights take once loaded as ``dtype``; read from the files' headers.

    Raises:
        BadModel: a damaged file.
    """
    tensors = (each for file in weight_files(path, variant) for each in header(file).values())
    return sum(_loaded_bytes(each, dtype) for each in tensors)


def adapter_bytes(path: Path) -> int:
    """The size of an adapter's file, or of the safetensors in its folder; 0 if it is missing."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.exists())


def _loaded_bytes(tensor: dict[str, Any], dtype: str | None) -> int:
    first, end = tensor["data_offsets"]
    stored = _FLOATS.get(tensor["dtype"])
    size = int(end) - int(first)
    if stored is None or dtype is None:
        return size
    return size // stored * _TARGETS.get(dtype, stored)
