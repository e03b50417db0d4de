"""Run a diffusers pipeline for one job: check the call, decode, run, encode."""

from __future__ import annotations

import difflib
import inspect
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from PIL import Image, UnidentifiedImageError

from gpuctl.errors import BadRequest, Cancelled
from gpuctld.messages import RunJob

OURS = frozenset(
    {
        "generator",
        "callback_on_step_end",
        "callback",
        "callback_steps",
        "output_type",
        "return_dict",
    }
)
"""Call parameters that the daemon sets itself."""

StepReport = Callable[[int, int], None]


@attrs.frozen
class Picture:
    """One encoded image and what the reply says about it."""

    data: bytes
    about: dict[str, Any]


def check_call(pipeline: Any, params: dict[str, Any], images: dict[str, Any]) -> None:
    """Compare a call with the pipeline's own signature.

    Raises:
        BadRequest: an unknown or reserved parameter, with the right spelling.
    """
    known = set(inspect.signature(pipeline.__call__).parameters) - OURS
    for name in [*params, *images]:
        if name in OURS:
            raise BadRequest(f"{name} is set by gpuctl", "see seed, count and format")
        if name not in known:
            raise BadRequest(f"{type(pipeline).__name__} has no {name!r}", _suggest(name, known))


def _suggest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(sorted(known))}"


def decode_images(
    images: dict[str, list[int]], blobs: Sequence[Any], max_pixels: int
) -> dict[str, Any]:
    """The input images by parameter: one image, or a list of several.

    Raises:
        BadRequest: not an image, or one larger than ``max_pixels``.
    """
    decoded = {
        name: [_decode(blobs[index], name, max_pixels) for index in indices]
        for name, indices in images.items()
    }
    return {name: many[0] if len(many) == 1 else many for name, many in decoded.items()}


def _decode(blob: Any, name: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(blob.buffer if hasattr(blob, "buffer") else blob))
        if image.width * image.height > max_pixels:
            raise BadRequest(
                f"{name} has {image.width} x {image.height} pixels; the limit is {max_pixels}",
                "scale it down, or raise max_pixels in [daemon]",
            )
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as broken:
        raise BadRequest(f"{name} is not a readable image: {broken}") from None
    except Image.DecompressionBombError as bomb:
        raise BadRequest(f"{name} is too large: {bomb}") from None


def run(
    pipeline: Any,
    job: RunJob,
    inputs: dict[str, Any],
    report: StepReport,
    is_cancelled: Callable[[], bool],
) -> Iterator[Picture]:
    """Call the pipeline once per prompt and seed.

    Noise is drawn on the CPU, so that a seed means the same image on every device of a kind. One
    call per image, so that an image does not depend on how many were asked for.

    Raises:
        Cancelled: within one denoise step of the request.
    """
    prompts = job.params.get("prompt")
    many = prompts if isinstance(prompts, list) else [prompts]
    calls = [(prompt, job.seed + k) for prompt in many for k in range(job.count)]
    for done, (prompt, seed) in enumerate(calls):
        watch = _StepWatch(done, len(calls), report, is_cancelled)
        params = {**job.params, **inputs}
        if prompt is not None:
            params["prompt"] = prompt
        output = _call(pipeline, params, seed, watch)
        for image in _images(output):
            yield _encode(image, job.format, {"seed": seed, "prompt": prompt})


def _call(pipeline: Any, params: dict[str, Any], seed: int, watch: _StepWatch) -> Any:
    generator = torch.Generator("cpu").manual_seed(seed)
    known = inspect.signature(pipeline.__call__).parameters
    with torch.inference_mode():
        if "callback_on_step_end" in known:
            return pipeline(**params, generator=generator, callback_on_step_end=watch.step_end)
        with watch.around(pipeline.scheduler):
            return pipeline(**params, generator=generator)


class _StepWatch:
    """Reports steps and stops the pipeline between two of them."""

    def __init__(
        self, before: int, calls: int, report: StepReport, is_cancelled: Callable[[], bool]
    ) -> None:
        self._before, self._calls = before, calls
        self._report = report
        self._is_cancelled = is_cancelled
        self._taken = 0

    def step_end(self, pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Diffusers' callback: after each denoise step."""
        self._note(step + 1, int(getattr(pipeline, "num_timesteps", 0) or step + 1))
        return tensors

    def around(self, scheduler: Any) -> _SteppedScheduler:
        """For pipelines without that callback: their scheduler steps once per denoise step."""
        return _SteppedScheduler(scheduler, self)

    def scheduler_stepped(self, scheduler: Any) -> None:
        """After each step of the scheduler."""
        self._taken += 1
        self._note(self._taken, len(scheduler.timesteps))

    def _note(self, step: int, steps: int) -> None:
        if self._is_cancelled():
            raise Cancelled("cancelled")
        self._report(self._before * steps + step, self._calls * steps)


class _SteppedScheduler:
    """Wraps ``scheduler.step`` for the time of one call."""

    def __init__(self, scheduler: Any, watch: _StepWatch) -> None:
        self._scheduler, self._watch = scheduler, watch

    def __enter__(self) -> None:
        original = self._scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._watch.scheduler_stepped(self._scheduler)
            return result

        self._scheduler.step = step

    def __exit__(self, *_: object) -> None:
        del self._scheduler.step


def _images(output: Any) -> list[Image.Image]:
    """The images of a pipeline's output; the frames of a video, in order."""
    found = getattr(output, "images", None)
    if found is None:
        found = [_as_image(frame) for video in output.frames for frame in video]
    return list(found)


def _as_image(frame: Any) -> Image.Image:
    if isinstance(frame, Image.Image):
        return frame
    return Image.fromarray((frame * 255).round().astype("uint8"))


def _encode(image: Image.Image, format_: str, about: dict[str, Any]) -> Picture:
    about |= {"width": image.width, "height": image.height, "mode": image.mode, "format": format_}
    if format_ == "raw":
        return Picture(image.tobytes(), about)
    buffer = io.BytesIO()
    image.save(buffer, format_.upper(), **({"lossless": True} if format_ == "webp" else {}))
    return Picture(buffer.getvalue(), about)
