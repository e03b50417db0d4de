"""Replies as people read them: lines for moves, tables for state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


def size(count: float) -> str:
    """Bytes in binary units: ``23.8 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds as people say them: ``31 ms``, ``2.41 s``, ``3 min 5 s``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.2f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


_AT = {"device": "on the device", "host": "in host memory", "disk": "on disk"}


def move(row: Row) -> str:
    """One worker's line: ``gpu 0  shapes  device -> host  23.8 GiB freed in 31 ms``."""
    where = f"gpu {row['gpu']}  {row['model'] or 'context'}"
    if row["error"] is not None:
        return f"{where}  stays {_AT[row['tier']]}: {row['error']['message']}"
    start, end = row["from_tier"], row["tier"]
    if not row["duration_s"] or start == end:
        return f"{where}  already {_AT[end]}"
    return f"{where}  {start} -> {end}  {_amount(row)} in {duration(row['duration_s'])}"


def _amount(row: Row) -> str:
    if row["tier"] == "device":
        return size(row["device_bytes"])
    return f"{size(row['freed_bytes'])} freed"


def moved(reply: Row) -> list[str]:
    """All lines of a load, unload or reload, and what it came to."""
    forced = [f"{_leased(lease)}, forced" for lease in reply.get("forced", [])]
    return [*forced, *(move(row) for row in reply["workers"]), summary(reply)]


def _leased(lease: Row) -> str:
    """Whose GPUs they are: ``gpu 0,1 leased to pid 4711 python score.py``."""
    return f"gpu {_gpus(lease)} leased to {_holder(lease)}"


def _gpus(lease: Row) -> str:
    return ",".join(map(str, lease["gpus"]))


def _holder(lease: Row) -> str:
    return f"pid {lease['holder']['pid']} {lease['holder']['command']}".strip()


def summary(reply: Row) -> str:
    """The closing line: ``freed 47.6 GiB in 30 ms on 2 GPUs``."""
    done = [row for row in reply["workers"] if row["error"] is None]
    moving = [row for row in done if row["duration_s"] and row["from_tier"] != row["tier"]]
    if not moving:
        return "nothing to do" if reply["ok"] else "nothing moved"
    freed = sum(row["freed_bytes"] for row in moving)
    what = f"freed {size(freed)}" if freed else str(moving[0]["state"])
    gpus = len({row["gpu"] for row in moving})
    return f"{what} in {duration(reply['duration_s'])} on {gpus} GPU{'s' * (gpus > 1)}"


def status(document: Row) -> list[Table]:
    """The tables of ``gpuctl status``."""
    tables = [_workers(document)]
    if document["leases"]:
        tables.append(_leases(document["leases"]))
    if document["jobs"]:
        tables.append(_jobs(document["jobs"]))
    return tables


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415  rich is slow to import, and --json needs none
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _workers(document: Row) -> Table:
    table = _table("gpu", "device", "state", "memory used", "models", "doing")
    for worker in document["workers"]:
        memory = worker["memory"]
        table.add_row(
            str(worker["gpu"]),
            _device(worker),
            _state(worker),
            f"{size(memory['used'])} of {size(memory['total'])}" if memory["total"] else "-",
            "\n".join(_model(each) for each in worker["models"]) or "-",
            _doing(worker),
        )
    return table


def _device(worker: Row) -> str:
    return worker["device"] if worker["device"] == "cpu" else f"{worker['device']} {worker['name']}"


def _state(worker: Row) -> str:
    restarts = f" ({worker['restarts']} restarts)" if worker["restarts"] else ""
    return f"{worker['state']}{restarts}"


def _model(held: Row) -> str:
    bytes_ = held["device_bytes"] or held["host_bytes"]
    adapters = "".join(f" +{each['name']}@{each['scale']:g}" for each in held["adapters"])
    way = "" if held["moves_by"] in {"slab", ""} else " (moves by .to())"
    problem = f": {held['error']['message']}" if held["error"] else ""
    return f"{held['model']}{adapters} {held['state']}, {size(bytes_)}{way}{problem}"


def _doing(worker: Row) -> str:
    """Its job; without one why it can take none, where that is so."""
    job = worker["job"]
    if job is None:
        return worker["reason"] or "idle"
    steps = f" {job['step']}/{job['steps']}" if job["steps"] else ""
    return f"{job['model']}{steps}"


def _leases(leases: list[Row]) -> Table:
    table = _table("lease", "gpus", "state", "holder", "age", "ends")
    for lease in leases:
        left = lease["expires_in_s"]
        table.add_row(
            lease["id"][:12],
            _gpus(lease),
            lease["state"],
            _holder(lease),
            duration(lease["age_s"]),
            "with its process" if left is None else f"in {duration(max(0.0, left))}",
        )
    return table


def _jobs(jobs: list[Row]) -> Table:
    table = _table("job", "model", "gpu", "state", "step", "age")
    for job in jobs:
        gpu = "-" if job["gpu"] is None else str(job["gpu"])
        steps = f"{job['step']}/{job['steps']}" if job["steps"] else "-"
        table.add_row(
            job["job"][:12], job["model"], gpu, job["state"], steps, duration(job["age_s"])
        )
    return table


def daemon(document: Row) -> str:
    """The line above the tables."""
    about = document["daemon"]
    up = duration(about["uptime_s"])
    line = f"gpuctld {about['version']}, pid {about['pid']}, up {up}, {about['socket']}"
    return "\n".join([line, *(f"degraded: {each}" for each in about["degraded"])])


def leases(found: list[Row]) -> Table:
    """``gpuctl lease list``."""
    return _leases(found)


def catalog(models: list[Row]) -> Table:
    """``gpuctl models``."""
    table = _table("model", "pipeline", "dtype", "host copy", "path")
    for model in models:
        problem = model["error"]["message"] if model["error"] else model["path"]
        host = size(model["host_bytes"]) if model["host_bytes"] else "-"
        name, pipeline = model["model"], model["pipeline"] or "?"
        table.add_row(name, pipeline, model["dtype"] or "-", host, problem)
    return table
