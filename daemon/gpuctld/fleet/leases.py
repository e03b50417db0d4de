"""Leases: GPUs handed to another program, and the way back.

waiting -> unloading -> held -> reloading -> gone. A lease begins with an unload and ends with a
reload of exactly what was loaded before, after the other program's memory is gone: the way to
``held`` is here, the way back in :mod:`gpuctld.fleet.handback`.
"""

from __future__ import annotations

from typing import Any

from gpuctl.errors import Busy, DeviceMemory, Leased, Timeout
from gpuctl.protocol import LeaseAcquire, LeaseRenew
from gpuctl.residency import Tier
from gpuctld.fleet import handback, moves, operations, placement, preflight, report
from gpuctld.fleet.effects import Answer, Send, WatchProcess
from gpuctld.fleet.events import Requested
from gpuctld.fleet.snapshot import KeptLease
from gpuctld.fleet.state import FleetState, Lease, LeaseState, Operation, Purpose, Worker
from gpuctld.messages import Probe

REMOTE_TTL_S = 15.0

PROBE_ANSWER_S = 5.0
"""For a worker to say what its device has free, or to come back and say it."""


def acquire(fleet: FleetState, event: Requested, now: float) -> None:
    """Take a lease, or stand in line for one.

    Raises:
        UnknownGpu: no such GPU.
        DeviceMemory: ``need_bytes`` exceeds a card.
        Leased: another lease is in force or first in line, and the caller does not wait.
        BadRequest, Busy: it is another user's, or being ended already (see :func:`_take_up`).
    """
    request: LeaseAcquire = event.request
    if request.id in fleet.leases:
        _take_up(fleet, fleet.leases[request.id], event, now)
        return
    workers = fleet.select(request.gpus)
    _check_size(workers, request.need_bytes)
    lease = _new(request, event, [worker.gpu for worker in workers], now)
    _refuse_conflict(fleet, lease, request.wait_s)
    _enter(fleet, lease)


def _new(request: LeaseAcquire, event: Requested, gpus: list[int], now: float) -> Lease:
    ttl = request.ttl_s or (None if event.peer.pid else REMOTE_TTL_S)
    return Lease(
        id=request.id,
        gpus=gpus,
        client=event.client,
        holder=event.peer,
        command=request.command,
        need_bytes=request.need_bytes,
        abort_jobs=request.mode == "abort",
        suspend=request.suspend,
        queue_jobs=request.queue_jobs,
        ttl_s=ttl,
        asked_at=now,
        renewed_at=now,
        wait_until=now + request.wait_s,
        deadline=float("inf") if request.timeout_s is None else now + request.timeout_s,
    )


def adopt(fleet: FleetState, kept: KeptLease, now: float) -> None:
    """Go on with a lease that was in force when an earlier daemon ended.

    Its holder has the time to live once more to renew it, or is watched; it may have ended already.
    """
    gpus = [gpu for gpu in kept.gpus if gpu in fleet.workers]
    if not gpus:
        return
    lease = Lease(
        id=kept.id,
        gpus=gpus,
        client=b"",  # it has a new connection now, if any
        holder=kept.holder,
        command=kept.command,
        queue_jobs=kept.queue_jobs,
        ttl_s=kept.ttl_s,
        asked_at=kept.asked_at,
        renewed_at=now,
        state=LeaseState.HELD,
        restore={gpu: names for gpu, names in kept.restore.items() if gpu in gpus},
        answered=True,
    )
    _enter(fleet, lease)


def _take_up(fleet: FleetState, lease: Lease, event: Requested, now: float) -> None:
    """The daemon that granted it ended before its holder heard of it, who has asked again."""
    handback.check_owner(lease, event.peer)
    if lease.ending:
        raise Busy(f"lease {lease.id} is being ended already")
    lease.renewed_at = now
    fleet.emit(Answer(lease.id, _granted(fleet, lease, now)))


def _enter(fleet: FleetState, lease: Lease) -> None:
    fleet.leases[lease.id] = lease
    if lease.ttl_s is None:  # it ends with its process; with a time to live it outlives that
        fleet.emit(WatchProcess(lease.id, lease.holder.pid, lease.asked_at))
    fleet.set_lease(lease, lease.state)


def _check_size(workers: list[Worker], need: int) -> None:
    for worker in workers:
        total = worker.memory["total"]
        if total and need > total:
            raise DeviceMemory(
                f"gpu {worker.gpu} has {placement.gib(total)} in all; {placement.gib(need)} asked"
            )


def _refuse_conflict(fleet: FleetState, lease: Lease, wait_s: float) -> None:
    other = _ahead(fleet, lease)
    if other is not None and wait_s <= 0:
        gpu = _shared(other, lease)
        raise Leased(f"gpu {gpu} is leased to {other.whose}", "wait for it with --wait 60s")


def _ahead(fleet: FleetState, lease: Lease) -> Lease | None:
    """The lease that goes first on a GPU of this one: in force, or asked for earlier."""
    for other in fleet.leases.values():
        if other is lease:
            return None
        if set(other.gpus) & set(lease.gpus):
            return other
    return None


def _shared(one: Lease, other: Lease) -> int:
    return min(set(one.gpus) & set(other.gpus))


def advance(fleet: FleetState, now: float) -> None:
    """Begin the leases that are first in line on all their GPUs; expire those that waited."""
    for lease in list(fleet.leases.values()):
        if lease.state is LeaseState.PROBING:
            _keep_probing(fleet, lease, now)
        if lease.state is not LeaseState.WAITING:
            continue
        if _ahead(fleet, lease) is None:
            _begin(fleet, lease, now)
        elif now >= min(lease.wait_until, lease.deadline):
            waited = now - lease.asked_at
            handback.refuse(fleet, lease, Timeout(f"the GPUs were not free in {waited:.1f} s"))


def _begin(fleet: FleetState, lease: Lease, now: float) -> None:
    workers = fleet.select(lease.gpus)
    lease.restore = {worker.gpu: _loaded(fleet, worker) for worker in workers}
    fleet.set_lease(lease, LeaseState.UNLOADING)
    id_ = f"begin-{lease.id}"
    steps = moves.unload_steps(fleet, workers, id_, Tier.HOST)
    if lease.suspend:
        steps += moves.suspend_steps(workers, id_)
    operation = Operation(
        id_,
        "unload",
        steps,
        now,
        purpose=Purpose.LEASE_BEGIN,
        lease=lease.id,
        abort_jobs=lease.abort_jobs,
        deadline=lease.deadline,
    )
    operations.begin(fleet, operation)


def _loaded(fleet: FleetState, worker: Worker) -> list[str]:
    """What is there, or is there when the line before us is done."""
    return [name for name, tier in fleet.promised(worker).items() if tier is Tier.DEVICE]


def operation_ended(fleet: FleetState, operation: Operation, now: float) -> None:
    """The unload before, or the reload after, a lease is over."""
    lease = fleet.leases.get(operation.lease)
    if lease is None:
        return
    if operation.purpose is Purpose.LEASE_BEGIN:
        _unloaded(fleet, lease, operation, now)
    elif operation.purpose is Purpose.LEASE_END:
        handback.reloaded(fleet, lease, operation, now)


def _unloaded(fleet: FleetState, lease: Lease, operation: Operation, now: float) -> None:
    lease.unload_rows = [step.row for step in operation.steps if step.row is not None]
    error = report.summary_error(lease.unload_rows)
    if lease.ended_because:  # its holder died or let go while the GPUs were being emptied
        handback.end(fleet, lease, now)
    elif error is not None:
        _give_up(fleet, lease, error, now)
    elif lease.need_bytes:
        fleet.set_lease(lease, LeaseState.PROBING)
        _probe(fleet, lease, now)
    else:
        _hold(fleet, lease, now)


def _probe(fleet: FleetState, lease: Lease, now: float) -> None:
    """Ask the driver whether what the holder needs is really free."""
    lease.probes = {}
    lease.asked_workers_at = now
    _ask_silent(fleet, lease, now)


def _ask_silent(fleet: FleetState, lease: Lease, now: float) -> None:
    lease.probe_at = now + preflight.REPROBE_S
    for gpu in lease.gpus:
        if gpu not in lease.probes and fleet.workers[gpu].up:
            fleet.emit(Send(gpu, Probe(task=lease.id)))


def _keep_probing(fleet: FleetState, lease: Lease, now: float) -> None:
    """Ask again; give up on a worker that does not come back."""
    silent = [gpu for gpu in lease.gpus if gpu not in lease.probes]
    patience = max(lease.wait_until, lease.asked_workers_at + PROBE_ANSWER_S)
    if silent and now >= min(patience, lease.deadline):
        worker = fleet.workers[silent[0]]
        why = f"gpu {worker.gpu} cannot say what is free: its worker is {worker.state}"
        error = Timeout(why, "ask without --need, or see gpuctl status")
        _give_up(fleet, lease, error.to_map(), now)
    elif now >= lease.probe_at and silent:
        _ask_silent(fleet, lease, now)
    elif now >= lease.probe_at:
        _probe(fleet, lease, now)


def probed(fleet: FleetState, lease_id: str, gpu: int, probe: dict[str, Any], now: float) -> None:
    """A worker has sampled its device for a lease that needs a certain amount."""
    lease = fleet.leases.get(lease_id)
    if lease is None or lease.state is not LeaseState.PROBING:
        return
    lease.probes[gpu] = probe
    if len(lease.probes) < len(lease.gpus):
        return
    shortages = (
        placement.shortage(fleet.workers[each], lease.need_bytes, sample)
        for each, sample in lease.probes.items()
    )
    short = next((error for error in shortages if error is not None), None)
    if short is None:
        _hold(fleet, lease, now)
    elif now >= min(lease.wait_until, lease.deadline):
        _give_up(fleet, lease, short.to_map(), now)


def _give_up(fleet: FleetState, lease: Lease, error: dict[str, Any], now: float) -> None:
    lease.ended_because = error["message"]
    reply = report.lease_reply(lease.id, "lease_acquire", lease, now, workers=lease.unload_rows)
    handback.answer(fleet, lease, {**reply, "ok": False, "error": error})
    handback.end(fleet, lease, now)


def _hold(fleet: FleetState, lease: Lease, now: float) -> None:
    fleet.set_lease(lease, LeaseState.HELD)
    lease.renewed_at = now
    handback.answer(fleet, lease, _granted(fleet, lease, now))


def _granted(fleet: FleetState, lease: Lease, now: float) -> dict[str, Any]:
    devices = [fleet.workers[gpu].device for gpu in lease.gpus]
    visible = ",".join(device.uuid for device in devices if device.is_cuda)
    fields = {"workers": lease.unload_rows, "cuda_visible_devices": visible}
    return report.lease_reply(lease.id, "lease_acquire", lease, now, **fields)


def renew(fleet: FleetState, event: Requested, now: float) -> None:
    """The holder lives.

    Raises:
        BadRequest: no such lease, or another user's.
    """
    request: LeaseRenew = event.request
    lease = handback.find(fleet, request.lease)
    handback.check_owner(lease, event.peer)
    lease.renewed_at = now
    fleet.emit(Answer(request.id, report.lease_reply(request.id, request.op, lease, now)))


def listing(fleet: FleetState, now: float) -> list[dict[str, Any]]:
    """All leases, those in force first."""
    ordered = sorted(fleet.leases.values(), key=lambda lease: not lease.active)
    return [report.lease(lease, now) for lease in ordered]
