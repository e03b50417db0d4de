"""The documents that clients see: rows, replies, the status. Reads the state, changes nothing."""

from __future__ import annotations

from typing import Any

from gpuctl.errors import BadModel, GpuctlError, Partial
from gpuctl.protocol import SCHEMA, Request
from gpuctl.residency import JOB_ENDED, TIER, Residency, Tier, WorkerState
from gpuctld.catalog import Model
from gpuctld.fleet.state import FleetState, Holding, Job, Lease, Operation, Step, Worker

DOING = {
    "load": "loading",
    "unload": "unloading",
    "reload": "reloading",
    "phase": "moving",
    "restore": "restoring",
    "lora_add": "adding an adapter to",
    "lora_remove": "removing an adapter from",
}
"""What an operation does, in the words of :func:`headline`."""


def reply(request_id: str, op: str, **fields: Any) -> dict[str, Any]:
    """A successful reply with the fields that all replies have."""
    return {"schema": SCHEMA, "op": op, "id": request_id, "ok": True, "error": None, **fields}


def refusal(request: Request, error: GpuctlError) -> dict[str, Any]:
    """The reply to a request that was not carried out at all."""
    fields: dict[str, Any] = {"ok": False, "error": error.to_map()}
    if request.op in {"load", "unload", "reload", "phase", "lease_acquire", "lease_release"}:
        fields |= {"duration_s": 0.0, "workers": []}
    return {**reply(request.id, request.op), **fields}


def row(worker: Worker, step: Step, now: float, **result: Any) -> dict[str, Any]:
    """One worker's line of a load, unload or reload; ``model`` is empty for its CUDA context."""
    return {
        "gpu": worker.gpu,
        "device": worker.device.name,
        "uuid": worker.device.uuid,
        "pid": worker.pid,
        "model": step.model,
        "state": state_after(worker, step),
        "from_tier": str(step.origin),
        "freed_bytes": 0,
        "residual_bytes": 0,
        **_place(worker, step),
        "duration_s": now - step.sent_at if step.sent_at else 0.0,
        "path": "",
        "foreign": [],
        "error": None,
        **result,
    }


def state_after(worker: Worker, step: Step) -> str:
    """The state of what the step is about: the worker itself, or one of its models."""
    return str(worker.state if step.suspend else worker.state_of(step.model))


def _place(worker: Worker, step: Step) -> dict[str, Any]:
    if step.suspend:
        tier = Tier.HOST if worker.state is WorkerState.SUSPENDED else Tier.DEVICE
        return {"tier": str(tier), "device_bytes": 0, "host_bytes": 0}
    held = worker.holding(step.model)
    return {
        "tier": str(TIER[held.state]),
        "device_bytes": held.device_bytes,
        "host_bytes": held.host_bytes,
    }


def moved(operation: Operation, now: float) -> dict[str, Any]:
    """The reply to a load, unload or reload. ``ok`` only if every worker did it."""
    rows = [step.row for step in operation.steps if step.row is not None]
    error = summary_error(rows)
    return {
        **reply(operation.id, operation.name),
        "ok": error is None,
        "duration_s": now - operation.accepted_at,
        "error": error,
        "workers": rows,
        "forced": operation.forced,
    }


def summary_error(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One error for all rows: none, the common one, or ``partial``."""
    failed = [line for line in rows if line["error"] is not None]
    if not failed:
        return None
    first: dict[str, Any] = failed[0]["error"]
    if len(failed) == len(rows):
        return first
    who = ", ".join(f"gpu {line['gpu']}" for line in failed)
    return Partial(
        f"{len(failed)} of {len(rows)} failed: {who}: {first['message']}", first["hint"]
    ).to_map()


def models(fleet: FleetState) -> list[dict[str, Any]]:
    """The catalog as clients see it."""
    return [_model(fleet, model) for model in fleet.catalog]


def _model(fleet: FleetState, model: Model) -> dict[str, Any]:
    pipeline, error = model.pipeline or "", None
    try:
        pipeline = model.pipeline_class()
    except BadModel as missing:
        error = missing.to_map()
    layout = fleet.layouts.get(model.name, {})
    return {
        "model": model.name,
        "path": model.path,
        "pipeline": pipeline,
        "dtype": model.dtype or layout.get("dtype", ""),
        "variant": model.variant,
        "devices": model.devices,
        "defaults": model.defaults,
        "adapters": {name: adapter.path for name, adapter in model.adapters.items()},
        "host_bytes": layout.get("slab_bytes", 0),
        "error": error,
    }


def status(fleet: FleetState, now: float) -> dict[str, Any]:
    """Workers, models, leases and jobs; the controller adds what it knows of itself."""
    return {
        "workers": [_worker(worker, now) for worker in fleet.workers.values()],
        "models": models(fleet),
        "leases": [lease(held, now) for held in fleet.leases.values()],
        "jobs": [job(each, now) for each in fleet.jobs.values() if each.state not in JOB_ENDED],
        "operations": [_operation(each, now) for each in fleet.operations],
    }


def _worker(worker: Worker, now: float) -> dict[str, Any]:
    running = worker.task.job if worker.task else None
    return {
        "gpu": worker.gpu,
        "device": worker.device.name,
        "uuid": worker.device.uuid,
        "name": worker.device.model_name,
        "pid": worker.pid,
        "state": str(worker.state),
        "reason": worker.reason,
        "restarts": worker.restarts,
        "job": job(running, now) if running else None,
        "memory": worker.memory,
        "memory_age_s": now - worker.sampled_at,
        "models": [_holding(held) for held in worker.models.values() if _worth_showing(held)],
    }


def _worth_showing(held: Holding) -> bool:
    return held.state is not Residency.ABSENT or held.error is not None


def _holding(held: Holding) -> dict[str, Any]:
    return {
        "model": held.model,
        "state": str(held.state),
        "tier": str(TIER[held.state]),
        "device_bytes": held.device_bytes if TIER[held.state] == "device" else 0,
        "host_bytes": held.host_bytes,
        "moves_by": held.moves_by,
        "moves_by_reason": held.moves_by_reason,
        "adapters": held.adapters,
        "error": held.error,
    }


def job(each: Job, now: float) -> dict[str, Any]:
    """A job as it stands in ``status`` and in events."""
    return {
        "job": each.id,
        "model": each.model,
        "gpu": each.gpu,
        "state": str(each.state),
        "step": each.step,
        "steps": each.steps,
        "age_s": now - each.queued_at,
    }


def lease(held: Lease, now: float) -> dict[str, Any]:
    """A lease as it stands in replies and in ``status``."""
    expires = None if held.ttl_s is None else held.renewed_at + held.ttl_s - now
    return {
        "id": held.id,
        "gpus": held.gpus,
        "state": str(held.state),
        "holder": {"pid": held.holder.pid, "uid": held.holder.uid, "command": held.command},
        "age_s": now - held.asked_at,
        "ttl_s": held.ttl_s,
        "expires_in_s": expires,
        "models": {str(gpu): names for gpu, names in held.restore.items()},
    }


def lease_reply(request_id: str, op: str, held: Lease, now: float, **fields: Any) -> dict[str, Any]:
    """The reply to a request about a lease."""
    about = {"lease": lease(held, now), "duration_s": now - held.asked_at}
    return reply(request_id, op, **about, **fields)


def _operation(operation: Operation, now: float) -> dict[str, Any]:
    return {
        "id": operation.id,
        "op": operation.name,
        "gpus": sorted(operation.gpus),
        "started": operation.started,
        "age_s": now - operation.accepted_at,
        "unfinished": len(operation.unfinished),
    }


def headline(fleet: FleetState) -> str:
    """One line for the service manager: ``loading flux on gpu 0, 2, 61 %``."""
    if fleet.stopping:
        return "stopping"
    for operation in fleet.operations:
        if operation.unfinished:
            return _doing(operation)
    wanted = sorted({name for worker in fleet.workers.values() for name in worker.wanted})
    return f"{len(fleet.workers)} workers, models: {', '.join(wanted) or 'none'}"


def _doing(operation: Operation) -> str:
    models = ", ".join(sorted({step.model for step in operation.unfinished}))
    gpus = ", ".join(str(gpu) for gpu in sorted({step.gpu for step in operation.unfinished}))
    done = sum(1.0 if step.row else step.done for step in operation.steps) / len(operation.steps)
    return f"{DOING[operation.name]} {models} on gpu {gpus}, {100 * done:.0f} %"
