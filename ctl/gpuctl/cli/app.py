"""The command group, its aliases, and what an error looks like."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click

from gpuctl import __version__
from gpuctl.errors import GpuctlError

COMMANDS = {
    "load": "moves",
    "unload": "moves",
    "reload": "moves",
    "drop": "moves",
    "phase": "moves",
    "status": "state",
    "models": "state",
    "events": "state",
    "cancel": "state",
    "version": "state",
    "doctor": "doctor",
    "generate": "generate",
    "edit": "generate",
    "run": "lease",
    "lease": "lease",
    "lora": "lora",
    "serve": "daemon",
    "config": "daemon",
    "keys": "keys",
    "completion": "daemon",
}
ALIASES = {"ps": "status", "sleep": "unload", "wake": "reload"}
INTERRUPTED = 130
BROKEN_PIPE = 141


class Commands(click.Group):
    """Imports a command's module when it is used: ``gpuctl status`` shall answer in a blink."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        module = import_module(f"gpuctl.cli.{COMMANDS[name]}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as unknown:
            raise self._with_suggestion(unknown, args[0]) from None

    def _with_suggestion(self, unknown: click.UsageError, given: str) -> click.UsageError:
        import difflib  # noqa: PLC0415

        close = difflib.get_close_matches(given, [*COMMANDS, *ALIASES], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " See gpuctl --help."
        return click.UsageError(f"No command {given!r}.{hint}", unknown.ctx)


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--socket", help="Where the daemon listens; default $GPUCTL_SOCKET.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, message="gpuctl %(version)s", help="Show the version.")
@click.pass_context
def gpuctl(ctx: click.Context, socket: str | None, debug: bool) -> None:
    """Move diffusion models off and on your GPUs in an instant.

    Aliases: ps = status, sleep = unload, wake = reload.
    """
    ctx.obj = {"socket": socket, "debug": debug}


def main() -> None:
    """Run what the command line says; leaves with the exit statuses of :mod:`gpuctl.errors`."""
    words = sys.argv[1:]
    debug = "--debug" in words or bool(os.environ.get("GPUCTL_DEBUG"))
    sys.exit(_run(words, debug=debug))


def _run(words: list[str], *, debug: bool) -> int:
    try:
        status: Any = gpuctl.main(args=words, prog_name="gpuctl", standalone_mode=False)
    except GpuctlError as error:
        if debug:
            raise
        complain(error)
        return error.exit_status
    except click.ClickException as wrong:
        wrong.show()
        return wrong.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return BROKEN_PIPE
    return status if isinstance(status, int) else 0


def complain(error: GpuctlError) -> None:
    """One sentence, and what to do."""
    click.echo(f"gpuctl: {error.message}", err=True)
    if error.hint:
        click.echo(f"  {error.hint}", err=True)
