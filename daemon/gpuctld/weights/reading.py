"""Reads a pipeline from disk, each weight file once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import torch

from gpuctl.errors import BadModel
from gpuctld import model_folder

READ_BYTES = 16 * 1024 * 1024
READERS = 8


@attrs.frozen(kw_only=True)
class ModelSource:
    """A model on disk, as the catalog names it."""

    name: str
    path: str
    dtype: str | None = None
    variant: str | None = None
    pipeline: str | None = None


def read(source: ModelSource) -> Any:
    """The pipeline on the CPU, in the wanted type; nothing is downloaded and no code is run.

    Raises:
        BadModel: names the file that is missing, damaged or not allowed.
    """
    path = Path(source.path)
    model_folder.check(path)
    _into_page_cache(model_folder.weight_files(path, source.variant))
    try:
        pipeline = _from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError) as failed:
        first = f"{failed}".splitlines()[0] if f"{failed}" else type(failed).__name__
        raise BadModel(f"{path}: {first}") from failed
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _from_pretrained(source: ModelSource) -> Any:
    import diffusers  # noqa: PLC0415  a worker has it already; others need not pay for it

    cls = getattr(diffusers, source.pipeline or "DiffusionPipeline", None)
    if cls is None:
        raise BadModel(f"diffusers has no pipeline {source.pipeline!r}")
    dtype = {"torch_dtype": getattr(torch, source.dtype)} if source.dtype else {}
    return cls.from_pretrained(
        source.path,
        variant=source.variant,
        use_safetensors=True,
        local_files_only=True,
        **dtype,
    )


def _into_page_cache(files: list[Path]) -> None:
    """Read ahead with several threads and large reads; loading then finds every page there."""
    spans = [
        (file, start)
        for file in files
        for start in range(0, file.stat().st_size, READ_BYTES * READERS)
    ]
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(_advise, spans))


def _advise(span: tuple[Path, int]) -> None:
    file, start = span
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, start, READ_BYTES * READERS, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
