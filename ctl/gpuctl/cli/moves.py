"""load, unload, reload, drop and phase."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from gpuctl import render
from gpuctl.cli.common import (
    connect,
    gpus_option,
    json_option,
    mode_option,
    print_json,
    timeout_option,
    wait_option,
)
from gpuctl.conversation import OnEvent, Reply
from gpuctl.errors import GpuctlError

Call = Callable[[OnEvent | None], Reply]

verify_option = click.option("--verify", is_flag=True, help="Check the weights on the device.")
force_option = click.option("--force", is_flag=True, help="Also on GPUs that are leased.")
fanout_option = click.option(
    "--fanout/--no-fanout", default=True, help="Share the host link between GPUs where they can."
)


@click.command("load")
@click.argument("model")
@click.option("--serial/--parallel", default=None, help="One GPU after the other, or all at once.")
@gpus_option
@click.option("--fail-fast", is_flag=True, help="Stop at the first GPU that fails.")
@verify_option
@fanout_option
@force_option
@wait_option
@timeout_option
@json_option
@click.pass_context
def load_command(ctx: click.Context, /, model: str, as_json: bool, **options: Any) -> None:
    """Bring MODEL onto its GPUs.

    In sequence when it comes from disk, all at once when it is parked in host memory.
    """
    client = connect(ctx)
    _show(lambda on_event: client.load(model, on_event=on_event, **_wire(options)), as_json)


@click.command("unload")
@click.argument("model", required=False)
@click.option("--all", "everything", is_flag=True, help="Every model (the default).")
@gpus_option
@click.option("--to", type=click.Choice(["host", "disk"]), default="host", help="What remains.")
@mode_option
@click.option("--suspend", is_flag=True, help="Give back the CUDA context's memory as well.")
@timeout_option
@json_option
@click.pass_context
def unload_command(
    ctx: click.Context, /, model: str | None, everything: bool, as_json: bool, **options: Any
) -> None:
    """Free the GPUs of MODEL, or of all models; the weights stay in host memory."""
    _refuse_both(model, everything)
    client = connect(ctx)
    _show(lambda on_event: client.unload(model, on_event=on_event, **_wire(options)), as_json)


@click.command("drop")
@click.argument("model", required=False)
@click.option("--all", "everything", is_flag=True, help="Every model (the default).")
@gpus_option
@mode_option
@timeout_option
@json_option
@click.pass_context
def drop_command(
    ctx: click.Context, /, model: str | None, everything: bool, as_json: bool, **options: Any
) -> None:
    """Free the GPUs and the host memory of MODEL, or of all models."""
    _refuse_both(model, everything)
    client = connect(ctx)
    _show(lambda on_event: client.drop(model, on_event=on_event, **_wire(options)), as_json)


@click.command("reload")
@click.argument("model", required=False)
@click.option("--all", "everything", is_flag=True, help="Every parked model (the default).")
@click.option("--serial", is_flag=True, help="One GPU after the other.")
@gpus_option
@verify_option
@fanout_option
@force_option
@wait_option
@timeout_option
@json_option
@click.pass_context
def reload_command(
    ctx: click.Context,
    /,
    model: str | None,
    everything: bool,
    serial: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Bring MODEL, or all parked models, back onto the GPUs."""
    _refuse_both(model, everything)
    client = connect(ctx)
    wire = _wire(options)
    wire["parallel"] = not serial
    _show(lambda on_event: client.reload(model, on_event=on_event, **wire), as_json)


@click.command("phase")
@click.argument("name")
@mode_option
@timeout_option
@json_option
@click.pass_context
def phase_command(ctx: click.Context, /, name: str, as_json: bool, **options: Any) -> None:
    """Move to the phase NAME of the configuration with the fewest transfers."""
    client = connect(ctx)
    _show(lambda _: client.phase(name, **_wire(options)), as_json)


def _refuse_both(model: str | None, everything: bool) -> None:
    if model is not None and everything:
        raise click.UsageError("Give a MODEL or --all, not both.")


def _wire(options: dict[str, Any]) -> dict[str, Any]:
    return {"timeout_s" if name == "timeout" else name: value for name, value in options.items()}


def _show(call: Call, as_json: bool) -> None:
    """Carry out a move and print its reply, also when some workers failed."""
    terminal = sys.stderr.isatty()
    try:
        reply = _with_bar(call) if terminal and not as_json else call(None)
    except GpuctlError as error:
        if error.reply is not None and (as_json or error.reply["workers"]):
            _print(error.reply, as_json)
        if as_json:
            click.get_current_context().exit(error.exit_status)
        raise
    _print(reply, as_json)


def _print(reply: Reply, as_json: bool) -> None:
    if as_json:
        print_json(reply.fields)
        return
    for line in render.moved(reply.fields):
        click.echo(line)


def _with_bar(call: Call) -> Reply:
    """A bar per GPU, in bytes, gone when the move is over."""
    from rich.console import Console  # noqa: PLC0415  rich is slow to import
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn  # noqa: PLC0415

    columns = (TextColumn("gpu {task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[int, Any] = {}

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] != "move" or not event["total"]:
                return
            gpu = event["gpu"]
            if gpu not in tasks:
                tasks[gpu] = bars.add_task(f"{gpu}  {event['model']}", total=event["total"])
            bars.update(tasks[gpu], completed=event["done"], total=event["total"])

        return call(on_event)
