"""generate and edit: one prompt, or a file of jobs spread over all workers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from gpuctl.cli.common import connect, print_json
from gpuctl.client import Client
from gpuctl.conversation import Reply
from gpuctl.errors import BadRequest, GpuctlError, Partial
from gpuctl.jobs import Job

FORMATS = ("png", "webp")
OWN = frozenset({"name", "image", "images", "seed", "count"})
"""Keys of a line in a jobs file that are not call parameters."""


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("--jobs", type=click.Path(path_type=Path), help="JSON lines, a job each."),
        click.option("--out", type=click.Path(path_type=Path), help="File, or folder of --jobs."),
        click.option("--seed", type=click.IntRange(min=0), help="Image k uses seed + k."),
        click.option("--count", type=click.IntRange(1, 64), default=1, help="Images per prompt."),
        click.option("--steps", type=click.IntRange(min=1), help="Denoising steps."),
        click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Parameter."),
        click.option("--gpu", type=int, help="Only on this GPU."),
        click.option("--format", "format_", type=click.Choice(FORMATS), default="png"),
        click.option(
            "--on-parked",
            type=click.Choice(["refuse", "wait", "reload"]),
            default="refuse",
            help="When the weights are in host memory.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the reply as JSON."),
        click.pass_context,
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command("generate")
@click.argument("model")
@click.argument("prompt", required=False)
@_common
def generate_command(ctx: click.Context, /, model: str, prompt: str | None, **options: Any) -> None:
    """Draw PROMPT with MODEL, or every job of a file on all GPUs."""
    _run(ctx, model, prompt, None, **options)


@click.command("edit")
@click.argument("model")
@click.argument("image", required=False, type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@_common
def edit_command(
    ctx: click.Context, /, model: str, image: Path | None, prompt: str | None, **options: Any
) -> None:
    """Edit IMAGE as PROMPT says with MODEL, or every job of a file on all GPUs."""
    _run(ctx, model, prompt, image, **options)


def _run(
    ctx: click.Context, model: str, prompt: str | None, image: Path | None, **options: Any
) -> None:
    jobs, out, format_ = options.pop("jobs"), options.pop("out"), options.pop("format_")
    as_json = options.pop("as_json")
    if (prompt is None) == (jobs is None):
        raise click.UsageError("Give a PROMPT or --jobs FILE, one of the two.")
    make = _JobMaker(model, format_, options)
    client = connect(ctx)
    if jobs is None:
        _one(client, make.single(prompt or "", image), out, as_json)
    else:
        _many(client, make.from_file(jobs), out or Path(), format_)


class _JobMaker:
    """Jobs from the command line's options and, line by line, from a file."""

    def __init__(self, model: str, format_: str, given: dict[str, Any]) -> None:
        self._model = model
        self._seed, self._count = given["seed"], given["count"]
        self._params = dict(_setting(each) for each in given["settings"])
        if given["steps"] is not None:
            self._params["num_inference_steps"] = given["steps"]
        self._options = {
            "gpu": given["gpu"],
            "on_parked": given["on_parked"],
            "format": format_,
        }

    def single(self, prompt: str, image: Path | None) -> Job:
        return self._job({"prompt": prompt, **({"image": str(image)} if image else {})}, "image")

    def from_file(self, path: Path) -> list[Job]:
        """One job per line.

        Raises:
            BadRequest: names the file and the line that is wrong.
        """
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as unreadable:
            raise BadRequest(f"{path}: {unreadable}") from None
        jobs = [
            self._line(path, number, line)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
        _refuse_twice(path, jobs)
        return jobs

    def _line(self, path: Path, number: int, line: str) -> Job:
        try:
            fields = json.loads(line)
        except ValueError as wrong:
            raise BadRequest(f"{path}, line {number}: {wrong}") from None
        if not isinstance(fields, dict):
            raise BadRequest(f"{path}, line {number}: not a JSON object")
        return self._job(fields, f"{number:05d}")

    def _job(self, fields: dict[str, Any], name: str) -> Job:
        given = {key: value for key, value in fields.items() if key not in OWN}
        images = fields.get("images") or ({"image": fields["image"]} if "image" in fields else {})
        return Job(
            self._model,
            {**self._params, **given},
            images,
            fields.get("seed", self._seed),
            fields.get("count", self._count),
            name=str(fields.get("name", name)),
            options=self._options,
        )


def _refuse_twice(path: Path, jobs: list[Job]) -> None:
    seen: set[str] = set()
    for job in jobs:
        if job.name in seen:
            raise BadRequest(f"{path}: the name {job.name!r} stands there twice")
        if Path(job.name).name != job.name:
            raise BadRequest(f"{path}: the name {job.name!r} is not a plain file name")
        seen.add(job.name)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set {text}: give NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _one(client: Client, job: Job, out: Path | None, as_json: bool) -> None:
    request, blobs = job.request()
    reply = client.ask(request, blobs)
    paths = save(reply, out or Path(f"{job.model}.{request.format}"))
    if as_json:
        files = [str(path) for path in paths]
        print_json({**reply.fields, "files": files})
        return
    for path, about in zip(paths, reply["images"], strict=True):
        click.echo(f"{path}  {about['width']}x{about['height']}  seed {about['seed']}")


def save(reply: Reply, path: Path) -> list[Path]:
    """Write a reply's images: to ``path``, or numbered beside it when there are several."""
    many = len(reply["images"]) > 1
    paths = [_numbered(path, k) if many else path for k in range(len(reply["images"]))]
    for target, about in zip(paths, reply["images"], strict=True):
        _write_whole(target, reply.blobs[about["blob"]])
    return paths


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _write_whole(path: Path, data: bytes) -> None:
    """All of the file or none of it, so that an interrupted run can go on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(data)
    fresh.replace(path)


def _many(client: Client, jobs: list[Job], out: Path, format_: str) -> None:
    """All jobs of a file that have no output yet."""
    todo = [job for job in jobs if not _outputs(job, out, format_)[-1].exists()]
    if len(todo) < len(jobs):
        click.echo(f"{len(jobs) - len(todo)} of {len(jobs)} are there already", err=True)
    failed = 0
    for job, outcome in _progress(client.replies(todo), len(todo)):
        if isinstance(outcome, GpuctlError):
            failed += 1
            click.echo(f"{job.name}: {outcome.message}", err=True)
        else:
            save(outcome, out / f"{job.name}.{format_}")
    click.echo(f"{len(todo) - failed} done, {failed} failed, in {out}")
    if failed:
        raise Partial(f"{failed} of {len(todo)} jobs failed", "run it again: what is there is kept")


def _outputs(job: Job, out: Path, format_: str) -> list[Path]:
    path = out / f"{job.name}.{format_}"
    prompts = job.params.get("prompt")
    images = job.count * (len(prompts) if isinstance(prompts, list) else 1)
    return [path] if images == 1 else [_numbered(path, number) for number in range(images)]


def _progress(outcomes: Iterator[Any], total: int) -> Iterator[Any]:
    """A bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield from outcomes
        return
    from rich.console import Console  # noqa: PLC0415  rich is slow to import
    from rich.progress import track  # noqa: PLC0415

    yield from track(outcomes, "drawing", total=total, console=Console(stderr=True), transient=True)
