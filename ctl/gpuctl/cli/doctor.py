"""doctor: what stands in the way, each with its remedy."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from gpuctl import render
from gpuctl.cli.common import connect, json_option, print_json
from gpuctl.errors import GpuctlError
from gpuctl.paths import mps_control

PACKAGES = ("torch", "diffusers", "transformers", "pyzmq", "msgpack", "cuda-bindings")
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at; ``remedy`` is empty where all is well."""

    what: str
    found: str
    remedy: str = ""


@click.command("doctor")
@json_option
@click.pass_context
def doctor_command(ctx: click.Context, as_json: bool) -> None:
    """Look at driver, limits, memory, versions and the daemon."""
    machine = [_driver(), _mps(), _memlock(), _host_memory(), _peer_access()]
    findings = [*_versions(), *machine, _daemon(ctx)]
    if as_json:
        print_json({"schema": 1, "findings": [asdict(each) for each in findings]})
        return
    for each in findings:
        mark = "!" if each.remedy else "ok"
        click.echo(f"{mark:>2}  {each.what}: {each.found}")
        if each.remedy:
            click.echo(f"    {each.remedy}")


def _versions() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    for name in PACKAGES:
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "not installed", "pip install 'gpuctld[daemon]'")


def _driver() -> Finding:
    version = Path("/proc/driver/nvidia/version")
    if not version.exists():
        return Finding("driver", "no NVIDIA driver", 'devices = ["cpu", "cpu"] works without')
    return Finding("driver", version.read_text().splitlines()[0].removeprefix("NVRM version: "))


def _mps() -> Finding:
    control = mps_control()
    if control is None:
        return Finding("MPS", "not in use")
    return Finding(
        "MPS",
        f"in use: {control}",
        "a fault in one worker ends the others: echo quit | nvidia-cuda-mps-control",
    )


def _memlock() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Finding("memory lock limit", "unlimited")
    return Finding(
        "memory lock limit",
        render.size(limit),
        "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit, if pinning fails",
    )


def _host_memory() -> Finding:
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    free = int(fields["MemAvailable"].split()[0]) * 1024
    remedy = "" if free > 8 * GIB else "each model needs its weights' size in host memory"
    return Finding("host memory", f"{render.size(free)} available", remedy)


def _peer_access() -> Finding:
    nodes = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if len(nodes) < 2:
        return Finding("peer access", "fewer than two GPUs: nothing to share")
    links = "nvidia-smi topo -p2p r shows which pairs have it"
    return Finding("peer access", f"{len(nodes)} GPUs; {links}")


def _daemon(ctx: click.Context) -> Finding:
    client: Any = connect(ctx)
    try:
        about = client.status()
    except GpuctlError as error:
        return Finding("daemon", error.message, error.hint)
    problems = "; ".join(about["daemon"]["degraded"])
    up = f"pid {about['daemon']['pid']}, {len(about['workers'])} workers on {client.endpoint}"
    return Finding("daemon", up, problems)
