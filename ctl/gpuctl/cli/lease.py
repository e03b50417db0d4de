"""run and lease: hand the GPUs to another program and take them back."""

from __future__ import annotations

from typing import Any

import click

from gpuctl import protocol, render
from gpuctl.cli.common import (
    Seconds,
    Size,
    connect,
    gpus_option,
    json_option,
    mode_option,
    print_json,
    timeout_option,
)
from gpuctl.run import hand_over

need_option = click.option("--need", "need_bytes", type=Size(), default=0, help="Free memory.")
suspend_option = click.option("--suspend", is_flag=True, help="Free the CUDA contexts as well.")
queue_option = click.option(
    "--wait", "wait_s", type=Seconds(), default=0.0, help="Wait this long behind another lease."
)


@click.command("run", context_settings={"ignore_unknown_options": True})
@gpus_option
@need_option
@suspend_option
@mode_option
@queue_option
@timeout_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run_command(ctx: click.Context, /, command: tuple[str, ...], **options: Any) -> None:
    """Unload the models, run COMMAND with the GPUs to itself, load them again.

    \b
        gpuctl run --gpu 0,1 --need 30GiB -- python score.py

    Ends with COMMAND's own status; 126 or 127 if it cannot be run or found; as other commands do
    if the GPUs cannot be had; 125 if anything else fails before the start.
    """  # noqa: D301  click knows \b as the sign for text as it stands
    ctx.exit(hand_over(connect(ctx), list(command), _acquire(options, " ".join(command))))


def _acquire(options: dict[str, Any], command: str) -> protocol.LeaseAcquire:
    timeout = options.pop("timeout")
    return protocol.LeaseAcquire(timeout_s=timeout, command=command[:200], **options)


@click.group("lease")
def lease_command() -> None:
    """Keep GPUs free for a program that runs long."""


@lease_command.command("acquire")
@gpus_option
@need_option
@suspend_option
@mode_option
@queue_option
@timeout_option
@click.option("--ttl", "ttl_s", type=Seconds(), default=60.0, show_default=True)
@click.option("--for", "command", default="", help="What it is for, shown in the list.")
@json_option
@click.pass_context
def acquire(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Take a lease and print its id. Renew it within its time to live."""
    command = options.pop("command")
    reply = connect(ctx).ask(_acquire(options, command))
    if as_json:
        print_json(reply.fields)
    else:
        click.echo(reply["lease"]["id"])


@lease_command.command("release")
@click.argument("lease")
@click.option("--force", is_flag=True, help="Also a lease of another user.")
@click.option("--no-reload", is_flag=True, help="Leave the models parked.")
@click.option("--wait", "wait_s", type=Seconds(), default=30.0, help="For the memory to be free.")
@json_option
@click.pass_context
def release(ctx: click.Context, /, as_json: bool, no_reload: bool, **options: Any) -> None:
    """End a lease and load again what was loaded before."""
    reply = connect(ctx).ask(protocol.LeaseRelease(reload=not no_reload, **options))
    if as_json:
        print_json(reply.fields)
        return
    for line in render.moved(reply.fields):
        click.echo(line)


@lease_command.command("renew")
@click.argument("lease")
@click.pass_context
def renew(ctx: click.Context, /, lease: str) -> None:
    """Say that the holder is alive."""
    reply = connect(ctx).ask(protocol.LeaseRenew(lease=lease))
    click.echo(f"renewed, expires in {render.duration(reply['lease']['expires_in_s'] or 0)}")


@lease_command.command("list")
@json_option
@click.pass_context
def list_(ctx: click.Context, /, as_json: bool) -> None:
    """Show the leases in force and those that wait."""
    reply = connect(ctx).ask(protocol.LeaseList())
    if as_json:
        print_json(reply.fields)
    elif not reply["leases"]:
        click.echo("no leases")
    else:
        from rich.console import Console  # noqa: PLC0415  rich is slow to import

        Console().print(render.leases(reply["leases"]))
