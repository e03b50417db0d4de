"""Options and output that several commands share."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from gpuctl.client import Client

F = TypeVar("F", bound=Callable[..., Any])

_TIME = re.compile(r"([0-9.]+)(ms|s|m|h)?$")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"([0-9.]+)\s*([KMGT]?)(i?)B?$")


class Seconds(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """``60s``, ``2m``, ``1.5`` (seconds)."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        match = _TIME.match(str(value))
        if match is None:
            self.fail(f"{value!r} is not a time such as 60s or 2m", param, ctx)
        return float(match[1]) * _SECONDS[match[2] or "s"]


class Size(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """``30GiB``, ``512M``, plain bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _SIZE.match(str(value))
        if match is None:
            self.fail(f"{value!r} is not a size such as 30GiB", param, ctx)
        power = " KMGT".index(match[2] or " ")
        return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


class Gpus(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """``0,2``."""

    name = "gpus"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(word) for word in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of GPU numbers such as 0,2", param, ctx)


gpus_option = click.option("--gpu", "gpus", type=Gpus(), help="Only these GPUs, such as 0,2.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the reply as JSON.")
timeout_option = click.option("--timeout", type=Seconds(), help="Give up after this long.")
mode_option = click.option(
    "--mode", type=click.Choice(["wait", "abort"]), default="wait", help="Running jobs."
)
wait_option = click.option(
    "--wait", "wait_s", type=Seconds(), default=0.0, help="Wait this long for memory."
)


def connect(ctx: click.Context) -> Client:
    """The client for the daemon that the command line names."""
    return Client(ctx.obj["socket"])


def print_json(document: Any) -> None:
    """One document on stdout."""
    click.echo(json.dumps(document, indent=2 if sys.stdout.isatty() else None))
