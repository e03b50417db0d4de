"""Leases: GPUs handed to another program, and the way back.

waiting -> unloading -> held -> reloading -> gone. A lease begins with an unload and ends with a
reload of exactly what was loaded before, after the other program's memory is gone.
"""

from __future__ import annotations

from typing import Any

from gpuctl.errors import (
    BadRequest,
    Busy,
    Cancelled,
    DeviceMemory,
    GpuctlError,
    Leased,
    Timeout,
)
from gpuctl.protocol import LeaseAcquire, LeaseRelease, LeaseRenew
from gpuctl.residency import Tier
from gpuctld.fleet import moves, operations, placement, preflight, report
from gpuctld.fleet.effects import Answer, Send, UnwatchProcess, WatchProcess
from gpuctld.fleet.events import Peer, Requested
from gpuctld.fleet.snapshot import KeptLease
from gpuctld.fleet.state import FleetState, Lease, LeaseState, Operation, Purpose, Step, Worker
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
    """
    request: LeaseAcquire = event.request
    workers = fleet.select(request.gpus)
    _check_size(workers, request.need_bytes)
    lease = _new(request, event, [worker.gpu for worker in workers], now)
    _refuse_conflict(fleet, lease, request.wait_s)
    fleet.leases[lease.id] = lease
    if lease.ttl_s is None:  # it ends with its process; with a time to live it outlives that
        fleet.emit(WatchProcess(lease.id, lease.holder.pid, lease.asked_at))
    _publish(fleet, lease)


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
        need_bytes=0,
        abort_jobs=False,
        suspend=False,
        queue_jobs=kept.queue_jobs,
        ttl_s=kept.ttl_s,
        asked_at=kept.asked_at,
        renewed_at=now,
        wait_until=now,
        deadline=float("inf"),
        state=LeaseState.HELD,
        restore={gpu: names for gpu, names in kept.restore.items() if gpu in gpus},
        answered=True,
    )
    fleet.leases[lease.id] = lease
    if lease.ttl_s is None:
        fleet.emit(WatchProcess(lease.id, lease.holder.pid, lease.asked_at))
    _publish(fleet, lease)


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


# --- beginning ------------------------------------------------------------------------------


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
            _refuse(fleet, lease, Timeout(f"the GPUs were not free in {waited:.1f} s"))


def _begin(fleet: FleetState, lease: Lease, now: float) -> None:
    workers = fleet.select(lease.gpus)
    lease.restore = {worker.gpu: _loaded(fleet, worker) for worker in workers}
    lease.state = LeaseState.UNLOADING
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
    _publish(fleet, lease)


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
        _reloaded(fleet, lease, operation, now)


def _unloaded(fleet: FleetState, lease: Lease, operation: Operation, now: float) -> None:
    lease.unload_rows = [step.row for step in operation.steps if step.row is not None]
    error = report.summary_error(lease.unload_rows)
    if lease.ended_because:  # its holder died or let go while the GPUs were being emptied
        end(fleet, lease, now)
    elif error is not None:
        _give_up(fleet, lease, error, now)
    elif lease.need_bytes:
        _probe(fleet, lease, now)
    else:
        _hold(fleet, lease, now)


def _probe(fleet: FleetState, lease: Lease, now: float) -> None:
    """Ask the driver whether what the holder needs is really free."""
    lease.state = LeaseState.PROBING
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
    reply = _reply(lease.id, "lease_acquire", lease, now, workers=lease.unload_rows)
    _answer(fleet, lease, {**reply, "ok": False, "error": error})
    end(fleet, lease, now)


def _hold(fleet: FleetState, lease: Lease, now: float) -> None:
    lease.state = LeaseState.HELD
    lease.renewed_at = now
    names = [fleet.workers[gpu].device for gpu in lease.gpus]
    visible = ",".join(device.uuid for device in names if device.is_cuda)
    _publish(fleet, lease)
    fields = {"workers": lease.unload_rows, "cuda_visible_devices": visible}
    _answer(fleet, lease, _reply(lease.id, "lease_acquire", lease, now, **fields))


def _answer(fleet: FleetState, lease: Lease, reply: dict[str, Any]) -> None:
    """Who asked for the lease hears once whether they have it."""
    if not lease.answered:
        lease.answered = True
        fleet.emit(Answer(lease.id, reply))


def _refuse(fleet: FleetState, lease: Lease, error: GpuctlError) -> None:
    _forget(fleet, lease)
    _answer_refusal(fleet, lease, error)


def _answer_refusal(fleet: FleetState, lease: Lease, error: GpuctlError) -> None:
    reply = report.reply(lease.id, "lease_acquire", workers=[], duration_s=0.0)
    _answer(fleet, lease, {**reply, "ok": False, "error": error.to_map()})


# --- ending ---------------------------------------------------------------------------------


def release(fleet: FleetState, event: Requested, now: float) -> None:
    """End a lease on request; the answer comes when the models are back.

    Raises:
        BadRequest: no such lease, or another user's without ``force``.
        Busy: it is being ended already.
    """
    request: LeaseRelease = event.request
    lease = _find(fleet, request.lease)
    if not request.force:
        _check_owner(lease, event.peer)
    if lease.state is LeaseState.WAITING:
        _refuse(fleet, lease, Busy("released while it waited"))
        fleet.emit(Answer(request.id, _reply(request.id, "lease_release", lease, now, workers=[])))
        return
    if lease.state is LeaseState.RELOADING or lease.release_request:
        raise Busy(f"lease {lease.id} is being ended already")
    lease.release_request = request.id
    lease.reload_wait_s = request.wait_s
    if request.timeout_s is not None:
        lease.reload_deadline = now + request.timeout_s
    if not request.reload:
        lease.restore = {}
    _let_go(fleet, lease, Busy("released before it was granted"), now)


def cancel(fleet: FleetState, lease: Lease, peer: Peer, why: GpuctlError, now: float) -> None:
    """Take the request for a lease back, whatever has become of it.

    Raises:
        BadRequest: it is another user's.
    """
    _check_owner(lease, peer)
    withdraw(fleet, lease.id, why, now)


def _check_owner(lease: Lease, peer: Peer) -> None:
    if peer.uid != lease.holder.uid:
        raise BadRequest(
            f"lease {lease.id} belongs to user {lease.holder.uid}",
            f"gpuctl lease release --force {lease.id} ends it all the same",
        )


def _let_go(fleet: FleetState, lease: Lease, why: GpuctlError, now: float) -> None:
    """End it from any state but waiting; an unload under way is waited for first."""
    _answer_refusal(fleet, lease, why)
    lease.ended_because = lease.ended_because or why.message
    if lease.state in {LeaseState.HELD, LeaseState.PROBING}:
        end(fleet, lease, now)


def _find(fleet: FleetState, lease_id: str) -> Lease:
    if lease_id not in fleet.leases:
        raise BadRequest(f"no lease {lease_id!r}", "gpuctl lease list")
    return fleet.leases[lease_id]


def end(fleet: FleetState, lease: Lease, now: float) -> None:
    """Bring back what was loaded, when the other program's memory is gone."""
    lease.state = LeaseState.RELOADING
    id_ = f"end-{lease.id}"
    steps = [
        Step(gpu, model, Tier.DEVICE, id_)
        for gpu, names in lease.restore.items()
        for model in names
    ]
    operation = Operation(
        id_,
        "reload",
        [step for step in steps if step.model in fleet.catalog],
        now,
        purpose=Purpose.LEASE_END,
        lease=lease.id,
        wait_until=now + lease.reload_wait_s,
        deadline=lease.reload_deadline,
    )
    operations.begin(fleet, operation)
    _publish(fleet, lease)


def _reloaded(fleet: FleetState, lease: Lease, operation: Operation, now: float) -> None:
    rows = [step.row for step in operation.steps if step.row is not None]
    error = report.summary_error(rows)
    for row in rows:
        if row["error"] is not None:
            _keep_in_mind(fleet.workers[row["gpu"]], row)
    _forget(fleet, lease)
    if lease.release_request:
        reply = _reply(lease.release_request, "lease_release", lease, now, workers=rows)
        reply["duration_s"] = now - operation.accepted_at
        fleet.emit(Answer(lease.release_request, {**reply, "ok": error is None, "error": error}))


def _keep_in_mind(worker: Worker, row: dict[str, Any]) -> None:
    """Why a model is not back; a worker that is down brings it along when it is up again."""
    worker.holding(row["model"]).error = row["error"]
    if not worker.up:
        worker.wanted[row["model"]] = Tier.DEVICE


def _forget(fleet: FleetState, lease: Lease) -> None:
    fleet.leases.pop(lease.id, None)
    fleet.emit(UnwatchProcess(lease.id))
    fleet.publish("lease", lease=lease.id, gpus=lease.gpus, state="ended")


def holder_died(fleet: FleetState, lease_id: str, now: float) -> None:
    """The process that took the lease is gone; its GPUs come back."""
    withdraw(fleet, lease_id, Cancelled("its holder ended"), now)


def withdraw(fleet: FleetState, lease_id: str, why: GpuctlError, now: float) -> None:
    """Nobody wants the lease any more, in whatever state it is."""
    lease = fleet.leases.get(lease_id)
    if lease is None or lease.state is LeaseState.RELOADING:
        return
    if lease.state is LeaseState.WAITING:
        _refuse(fleet, lease, why)
    else:
        _let_go(fleet, lease, why, now)


def client_gone(fleet: FleetState, client: bytes, now: float) -> None:
    """A connection has ended: leases that only wait go with it."""
    for lease in [each for each in fleet.leases.values() if each.client == client]:
        if lease.state is LeaseState.WAITING:
            holder_died(fleet, lease.id, now)


def renew(fleet: FleetState, event: Requested, now: float) -> None:
    """The holder lives.

    Raises:
        BadRequest: no such lease, or another user's.
    """
    request: LeaseRenew = event.request
    lease = _find(fleet, request.lease)
    _check_owner(lease, event.peer)
    lease.renewed_at = now
    fleet.emit(Answer(request.id, _reply(request.id, request.op, lease, now)))


def expire(fleet: FleetState, now: float) -> None:
    """End leases whose holder has not renewed them in time."""
    for lease in list(fleet.leases.values()):
        late = lease.ttl_s is not None and now >= lease.renewed_at + lease.ttl_s
        if late and lease.state is LeaseState.HELD:
            lease.ended_because = "not renewed"
            end(fleet, lease, now)


def listing(fleet: FleetState, now: float) -> list[dict[str, Any]]:
    """All leases, those in force first."""
    ordered = sorted(fleet.leases.values(), key=lambda lease: not lease.active)
    return [report.lease(lease, now) for lease in ordered]


def _reply(id_: str, op: str, lease: Lease, now: float, **fields: Any) -> dict[str, Any]:
    document = report.lease(lease, now)
    return report.reply(id_, op, lease=document, duration_s=now - lease.asked_at, **fields)


def _publish(fleet: FleetState, lease: Lease) -> None:
    fleet.publish("lease", lease=lease.id, gpus=lease.gpus, state=str(lease.state))
