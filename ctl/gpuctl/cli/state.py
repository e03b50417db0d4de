"""status, models, events, cancel and version."""

from __future__ import annotations

import json
import time
from typing import Any

import click

import gpuctl
from gpuctl import render
from gpuctl.cli.common import Seconds, connect, json_option, print_json
from gpuctl.errors import BadRequest, NoDaemon


@click.command("status")
@click.option("--watch", is_flag=True, help="Again and again, until interrupted.")
@click.option("--interval", type=Seconds(), default=1.0, show_default=True)
@json_option
@click.pass_context
def status_command(ctx: click.Context, watch: bool, interval: float, as_json: bool) -> None:
    """Show the workers, where each model is, and who has a GPU."""
    client = connect(ctx)
    if watch:
        _watch(client, interval)
    document = client.status()
    if as_json:
        print_json(document)
    else:
        _print(document)


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415  rich is slow to import

    console = Console()
    console.print(render.daemon(document), highlight=False, soft_wrap=True)
    for table in render.status(document):
        console.print(table)


def _watch(client: Any, interval: float) -> None:
    from rich.console import Group  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    with Live(screen=True, auto_refresh=False) as live:
        while True:
            document = client.status()
            head = Text(render.daemon(document))
            live.update(Group(head, *render.status(document)), refresh=True)
            time.sleep(interval)


@click.command("models")
@json_option
@click.pass_context
def models_command(ctx: click.Context, as_json: bool) -> None:
    """Show the catalog."""
    models = connect(ctx).models()
    if as_json:
        print_json({"schema": 1, "models": models})
        return
    from rich.console import Console  # noqa: PLC0415

    Console().print(render.catalog(models))


@click.command("events")
@click.pass_context
def events_command(ctx: click.Context) -> None:
    """Stream everything that happens, one JSON object per line."""
    for event in connect(ctx).events():
        if event["event"] != "alive":
            click.echo(json.dumps(event))


@click.command("cancel")
@click.argument("id_", metavar="ID")
@click.pass_context
def cancel_command(ctx: click.Context, id_: str) -> None:
    """Cancel a job, a waiting operation or a waiting lease."""
    client = connect(ctx)
    if not client.cancel(_whole(client.status(), id_)):
        raise BadRequest(f"nothing under way has the id {id_}", "gpuctl status")
    click.echo(f"cancelled {id_}")


def _whole(document: dict[str, Any], start: str) -> str:
    """The id that begins with what ``status`` shows of it."""
    running = [worker["job"]["job"] for worker in document["workers"] if worker["job"]]
    ids = {job["job"] for job in document["jobs"]} | set(running)
    ids |= {each["id"] for each in (*document["operations"], *document["leases"])}
    found = [id_ for id_ in ids if id_.startswith(start)]
    return found[0] if len(found) == 1 else start


@click.command("version")
@click.pass_context
def version_command(ctx: click.Context) -> None:
    """Show the versions of client and daemon."""
    click.echo(f"gpuctl {gpuctl.__version__}")
    try:
        about = connect(ctx).ping()
    except NoDaemon:
        click.echo("gpuctld is not running")
        return
    click.echo(f"gpuctld {about['version']}, {about['protocol']}, pid {about['pid']}")
