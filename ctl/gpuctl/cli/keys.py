"""keys new."""

from __future__ import annotations

import re
from typing import Any

import click

from gpuctl import keys


@click.group("keys")
def keys_command() -> None:
    """Keys for a daemon that is reached over TCP."""


def _plain(_ctx: click.Context, _param: click.Parameter, name: str) -> Any:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise click.BadParameter("letters, digits, - and _ only")
    return name


@keys_command.command("new")
@click.option(
    "--name", default=keys.DEFAULT_NAME, show_default=True, callback=_plain, help="Whose it is."
)
def new(name: str) -> None:
    """Make a key pair and print its public line for the daemon's [tcp.clients]."""
    pair = keys.new(name)
    click.echo(f"secret key, for nobody else: {pair.file}", err=True)
    click.echo(f'{name} = "{pair.public.decode()}"')
