"""serve, config and completion."""

from __future__ import annotations

import os
import sys

import click

from gpuctl.errors import GpuctlError

NO_DAEMON_PACKAGE = GpuctlError("the daemon is not installed here", "pip install 'gpuctld[daemon]'")


@click.command(
    "serve",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def serve_command(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Run the daemon in the foreground; the same as gpuctld."""
    socket = ["--socket", ctx.obj["socket"]] if ctx.obj["socket"] else []
    _become_daemon([*socket, *arguments])


@click.group("config")
def config_command() -> None:
    """The daemon's configuration."""


@config_command.command("check")
@click.argument("path", required=False)
def check(path: str | None) -> None:
    """Check the configuration file that the daemon would read, or PATH."""
    _become_daemon(["--check-config", *(["--config", path] if path else [])])


def _become_daemon(arguments: list[str]) -> None:
    from importlib.util import find_spec  # noqa: PLC0415

    if find_spec("gpuctld") is None:
        raise NO_DAEMON_PACKAGE
    os.execv(sys.executable, [sys.executable, "-m", "gpuctld", *arguments])  # noqa: S606


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
        gpuctl completion bash > ~/.local/share/bash-completion/completions/gpuctl
    """  # noqa: D301  click knows \b as the sign for text as it stands
    from click.shell_completion import get_completion_class  # noqa: PLC0415

    from gpuctl.cli.app import gpuctl  # noqa: PLC0415  the group imports us

    found = get_completion_class(shell)
    assert found is not None  # noqa: S101  click has all three
    click.echo(found(gpuctl, {}, "gpuctl", "_GPUCTL_COMPLETE").source())
