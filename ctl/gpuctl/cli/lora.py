"""lora: adapters on loaded models."""

from __future__ import annotations

import click

from gpuctl.cli.common import connect, json_option, print_json
from gpuctl.conversation import Reply


@click.group("lora")
def lora_command() -> None:
    """Put LoRA adapters on a loaded model. They stay through unload and reload."""


@lora_command.command("add")
@click.argument("model")
@click.argument("adapter")
@click.option("--scale", default=1.0, show_default=True)
@json_option
@click.pass_context
def add(ctx: click.Context, model: str, adapter: str, scale: float, as_json: bool) -> None:
    """Load ADAPTER of the catalog onto MODEL."""
    _show(connect(ctx).lora_add(model, adapter, scale), as_json)


@lora_command.command("remove")
@click.argument("model")
@click.argument("adapter")
@json_option
@click.pass_context
def remove(ctx: click.Context, model: str, adapter: str, as_json: bool) -> None:
    """Take ADAPTER off MODEL."""
    _show(connect(ctx).lora_remove(model, adapter), as_json)


@lora_command.command("list")
@click.argument("model")
@json_option
@click.pass_context
def list_(ctx: click.Context, model: str, as_json: bool) -> None:
    """Show the adapters of MODEL."""
    _show(connect(ctx).lora_list(model), as_json)


def _show(reply: Reply, as_json: bool) -> None:
    if as_json:
        print_json(reply.fields)
        return
    for row in reply["workers"]:
        names = ", ".join(f"{each['name']} at {each['scale']:g}" for each in row["adapters"])
        click.echo(f"gpu {row['gpu']}  {row['model']}  {names or 'no adapters'}")
