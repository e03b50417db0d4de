"""Builds a daemon from its parts."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import attrs
import zmq

import gpuctl
from gpuctl.errors import BadModel
from gpuctld import catalog, model_folder, remote
from gpuctld.catalog import Catalog, Model
from gpuctld.config import Config
from gpuctld.controller import About, Controller, ServiceManager
from gpuctld.devices import Device
from gpuctld.doors import IPC, Door
from gpuctld.fleet import Fleet
from gpuctld.fleet.events import Reconfigured
from gpuctld.forkserver import ForkServer
from gpuctld.host_store import HostStore
from gpuctld.links import Links
from gpuctld.processes import Processes
from gpuctld.service_manager import Notifier
from gpuctld.signals import SignalPipe
from gpuctld.state_file import StateFile
from gpuctld.supervisor import Supervisor, WorkerSpec

WORKER_MAIN = "gpuctld.worker.main:main"


def read_catalog(settings: Config) -> Catalog:
    """The catalog with an estimate of each model's size, from the headers of its files.

    Adapters that are loaded with it are part of it.

    A folder that cannot be read counts as nothing here; loading it says what is wrong.
    """
    models = catalog.from_config(settings)
    return Catalog({m.name: attrs.evolve(m, estimated_bytes=_estimate(m)) for m in models})


def _estimate(model: Model) -> int:
    preloaded = (Path(each.path) for each in model.adapters.values() if each.preload)
    try:
        own = model_folder.estimate_bytes(Path(model.path), model.dtype, model.variant)
        return own + sum(map(model_folder.adapter_bytes, preloaded))
    except (BadModel, OSError):
        return 0


def build(  # noqa: PLR0913  the one place that knows all parts
    settings: Config,
    crew: list[Device],
    endpoint: str,
    private: Path,
    reconfigure: Callable[[], Reconfigured],
    connect: Callable[[], ForkServer],
    *,
    worker: str = WORKER_MAIN,
    manager: ServiceManager | None = None,
) -> Controller:
    """Wire a controller.

    Args:
        settings: the configuration.
        crew: the devices, numbered.
        endpoint: where clients connect.
        private: directory for the workers' own sockets.
        reconfigure: reads the configuration again.
        connect: finds or starts the fork server.
        worker: the workers' entry point; tests put faults in front of it.
        manager: whom to tell how the daemon is; nobody by default.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    specs = _specs(settings, crew, private)
    about = About(version=gpuctl.__version__, epoch=secrets.token_hex(8), socket=endpoint)
    return Controller(
        fleet=Fleet(settings, read_catalog(settings), crew),
        door=Door(context, endpoint, remote.from_config(settings)),
        links=Links(context, {gpu: spec.endpoint for gpu, spec in specs.items()}),
        supervisor=Supervisor(specs, worker, connect),
        store=HostStore(settings.daemon.host_budget),
        state_file=StateFile(Path(settings.daemon.state_dir).expanduser()),
        processes=Processes(),
        signals=SignalPipe(),
        manager=manager or Notifier(),
        about=about,
        reconfigure=reconfigure,
    )


def _specs(settings: Config, crew: list[Device], private: Path) -> dict[int, WorkerSpec]:
    peers = [str(private / f"peer-{device.gpu}.sock") for device in crew]
    return {
        device.gpu: WorkerSpec(
            device=device,
            endpoint=f"{IPC}{private}/worker-{device.gpu}.sock",
            peer_paths=peers,
            max_pixels=settings.daemon.max_pixels,
            threads=settings.daemon.threads,
        )
        for device in crew
    }
