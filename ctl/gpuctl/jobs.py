"""What a generation needs on the wire, and what it gives back. Pillow is imported when used."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl.conversation import Reply
from gpuctl.errors import BadRequest
from gpuctl.protocol import Generate

if TYPE_CHECKING:
    from PIL.Image import Image

Source = Any
"""An input image: a ``PIL.Image``, a path, or the bytes of an image file."""


@dataclass
class Job:
    """One call of a pipeline. ``name`` is the caller's own mark; ``params`` the call's."""

    model: str
    params: dict[str, Any] = field(default_factory=dict)
    images: Mapping[str, Source | Sequence[Source]] = field(default_factory=dict)
    seed: int | None = None
    count: int = 1
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def request(self, **options: Any) -> tuple[Generate, list[bytes]]:
        """The message and its blobs.

        Raises:
            BadRequest: an input image that is not there.
        """
        blobs: list[bytes] = []
        indices: dict[str, list[int]] = {}
        for name, given in self.images.items():
            many = list(given) if isinstance(given, list | tuple) else [given]
            indices[name] = list(range(len(blobs), len(blobs) + len(many)))
            blobs += [encoded(each) for each in many]
        message = Generate(
            model=self.model,
            params=self.params,
            images=indices,
            seed=self.seed,
            count=self.count,
            **{**self.options, **options},
        )
        return message, blobs


def encoded(source: Source) -> bytes:
    """The bytes of an image file for any kind of source.

    Raises:
        BadRequest: the file cannot be read, or it is no image.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | Path):
        try:
            return Path(source).read_bytes()
        except OSError as unreadable:
            raise BadRequest(f"{source}: {unreadable.strerror}") from None
    if not hasattr(source, "save"):
        raise BadRequest(f"{type(source).__name__} is not an image, a path or bytes")
    buffer = io.BytesIO()
    source.save(buffer, "PNG")
    return buffer.getvalue()


def pictures(reply: Reply) -> list[Image]:
    """The images of a reply, each with its ``seed`` and ``prompt`` in ``info``."""
    return [_picture(about, reply.blobs[about["blob"]]) for about in reply["images"]]


def _picture(about: dict[str, Any], data: bytes) -> Image:
    from PIL import Image as pil  # noqa: N813, PLC0415  a client that draws nothing needs no Pillow

    if about["format"] == "raw":
        image = pil.frombytes(about["mode"], (about["width"], about["height"]), data)
    else:
        image = pil.open(io.BytesIO(data))
        image.load()
    image.info |= {"seed": about["seed"], "prompt": about["prompt"]}
    return image
