"""``gpuctld``: reads the configuration and wires all parts. The one place that knows them all."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

import gpuctl
from gpuctl.errors import BadConfig, GpuctlError
from gpuctl.paths import default_socket, mps_control
from gpuctld import catalog, config, devices, doors, entrances, forkserver, lock, logs, remote
from gpuctld.config import Config
from gpuctld.devices import Device
from gpuctld.fleet.events import Reconfigured
from gpuctld.forkserver import ForkServer
from gpuctld.service import build, read_catalog
from gpuctld.service_manager import Notifier

log = logging.getLogger("gpuctld")

EX_CONFIG = 78
"""sysexits.h: the configuration is wrong, so starting again does not help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command ``gpuctld``; the exit status."""
    options = _parser().parse_args(arguments)
    logs.setup(options.log_level)
    try:
        _run(options)
    except BadConfig as wrong:
        return _complain(wrong, EX_CONFIG)
    except GpuctlError as refused:
        return _complain(refused, refused.exit_status)
    return 0


def _run(options: argparse.Namespace) -> None:
    settings, crew = _configuration(options)
    if options.check_config:
        print(f"ok: {len(crew)} devices, {len(settings.models)} models")  # noqa: T201
    else:
        serve(options, settings, crew)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpuctld", description="The gpuctl service.")
    parser.add_argument("--config", help="configuration file")
    parser.add_argument("--socket", help="endpoint for clients, ipc://...")
    parser.add_argument("--devices", help="auto, or a list such as cuda:0,cuda:3 or cpu,cpu")
    parser.add_argument("--workers", type=Path, help="socket of gpuctld-workers; default: a child")
    parser.add_argument("--check-config", action="store_true", help="check and leave")
    parser.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"]
    )
    parser.add_argument("--version", action="version", version=f"gpuctld {gpuctl.__version__}")
    return parser


def _complain(error: GpuctlError, status: int) -> int:
    log.error("not_started", extra=logs.fields(reason=error.message, hint=error.hint))
    return status


def _configuration(options: argparse.Namespace) -> tuple[Config, list[Device]]:
    """Flag over environment over file."""
    settings = config.read(config.find(options.config, os.environ))
    overrides: dict[str, Any] = {
        name: value
        for name in ("devices", "socket")
        if (value := getattr(options, name) or os.environ.get(f"GPUCTL_{name.upper()}"))
    }
    daemon = attrs.evolve(settings.daemon, **overrides)
    settings = settings.with_daemon(daemon)
    catalog.from_config(settings)
    remote.from_config(settings)
    gpus = devices.visible_gpus(devices.installed_gpus(), os.environ)
    return settings, devices.resolve(settings.daemon.devices, gpus)


def serve(options: argparse.Namespace, settings: Config, crew: list[Device]) -> None:
    """Run the daemon until it is told to stop.

    Raises:
        Busy: another daemon serves the socket.
    """
    endpoint = settings.daemon.socket or default_socket()
    path = doors.bindable(endpoint)
    doors.private_directory(path.parent, 0o750)
    entrances.raise_limit()
    with lock.acquire(path.with_suffix(".lock")), _private_directory(options) as private:
        _serve(options, settings, crew, endpoint, private)


@contextlib.contextmanager
def _private_directory(options: argparse.Namespace) -> Iterator[Path]:
    """Where the workers' sockets are, mode 0700: the workers' own, or ours and gone with us."""
    if options.workers is not None:
        yield options.workers.with_suffix("")
        return
    base = os.environ.get("RUNTIME_DIRECTORY") or os.environ.get("XDG_RUNTIME_DIR")
    directory = Path(tempfile.mkdtemp(prefix="gpuctld-", dir=base))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _serve(
    options: argparse.Namespace, settings: Config, crew: list[Device], endpoint: str, private: Path
) -> None:
    """Wire the parts."""
    manager = Notifier.from_environment()  # before any other process could inherit its address

    def reconfigure() -> Reconfigured:
        fresh, _ = _configuration(options)
        return Reconfigured(read_catalog(fresh), fresh.phases)

    def connect() -> ForkServer:
        return forkserver.attach(options.workers) if options.workers else forkserver.launch()

    if any(device.is_cuda for device in crew) and (control := mps_control()):
        log.warning("mps_in_use", extra=logs.fields(control=str(control), isolation="none"))
    controller = build(settings, crew, endpoint, private, reconfigure, connect, manager=manager)
    with contextlib.closing(controller):
        controller.run()


if __name__ == "__main__":
    sys.exit(main())
