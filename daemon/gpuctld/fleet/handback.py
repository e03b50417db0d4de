"""The end of a lease, whoever brings it about: its models come back.

Released, cancelled, not renewed in time, or its holder has died: from then on it is being ended,
and it is gone when what was loaded at its beginning is loaded again.
"""

from __future__ import annotations

from typing import Any

from gpuctl.errors import BadRequest, Busy, Cancelled, GpuctlError
from gpuctl.protocol import LeaseRelease
from gpuctl.residency import Tier
from gpuctld.fleet import operations, report
from gpuctld.fleet.effects import Answer, UnwatchProcess
from gpuctld.fleet.events import Peer, Requested
from gpuctld.fleet.state import FleetState, Lease, LeaseState, Operation, Purpose, Step, Worker


def release(fleet: FleetState, event: Requested, now: float) -> None:
    """End a lease on request; the answer comes when the models are back.

    Raises:
        BadRequest: no such lease, or another user's without ``force``.
        Busy: it is being ended already.
    """
    request: LeaseRelease = event.request
    lease = find(fleet, request.lease)
    if not request.force:
        check_owner(lease, event.peer)
    if lease.state is LeaseState.WAITING:
        refuse(fleet, lease, Busy("released while it waited"))
        reply = report.lease_reply(request.id, request.op, lease, now, workers=[])
        fleet.emit(Answer(request.id, reply))
        return
    if lease.ending or lease.release_request:
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
    check_owner(lease, peer)
    withdraw(fleet, lease.id, why, now)


def _let_go(fleet: FleetState, lease: Lease, why: GpuctlError, now: float) -> None:
    """End it from any state but waiting; an unload under way is waited for first."""
    _answer_refusal(fleet, lease, why)
    lease.ended_because = lease.ended_because or why.message
    if lease.state in {LeaseState.HELD, LeaseState.PROBING}:
        end(fleet, lease, now)


def end(fleet: FleetState, lease: Lease, now: float) -> None:
    """Bring back what was loaded, when the other program's memory is gone."""
    fleet.set_lease(lease, LeaseState.RELOADING)
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


def reloaded(fleet: FleetState, lease: Lease, operation: Operation, now: float) -> None:
    """The models are back, or it is known why not: the lease is over."""
    rows = [step.row for step in operation.steps if step.row is not None]
    error = report.summary_error(rows)
    for row in rows:
        if row["error"] is not None:
            _keep_in_mind(fleet.workers[row["gpu"]], row)
    _forget(fleet, lease)
    if lease.release_request:
        reply = report.lease_reply(lease.release_request, "lease_release", lease, now, workers=rows)
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
    if lease is None or lease.ending:
        return
    if lease.state is LeaseState.WAITING:
        refuse(fleet, lease, why)
    else:
        _let_go(fleet, lease, why, now)


def client_gone(fleet: FleetState, client: bytes, now: float) -> None:
    """A connection has ended: leases that only wait go with it."""
    for lease in [each for each in fleet.leases.values() if each.client == client]:
        if lease.state is LeaseState.WAITING:
            holder_died(fleet, lease.id, now)


def expire(fleet: FleetState, now: float) -> None:
    """End leases whose holder has not renewed them in time."""
    for lease in list(fleet.leases.values()):
        late = lease.ttl_s is not None and now >= lease.renewed_at + lease.ttl_s
        if late and lease.state is LeaseState.HELD:
            lease.ended_because = "not renewed"
            end(fleet, lease, now)


def find(fleet: FleetState, lease_id: str) -> Lease:
    """A lease by its id.

    Raises:
        BadRequest: there is none.
    """
    if lease_id not in fleet.leases:
        raise BadRequest(f"no lease {lease_id!r}", "gpuctl lease list")
    return fleet.leases[lease_id]


def check_owner(lease: Lease, peer: Peer) -> None:
    """Only the holder's user may do what follows.

    Raises:
        BadRequest: another user asks.
    """
    if peer.uid != lease.holder.uid:
        raise BadRequest(
            f"lease {lease.id} belongs to user {lease.holder.uid}",
            f"gpuctl lease release --force {lease.id} ends it all the same",
        )


def answer(fleet: FleetState, lease: Lease, reply: dict[str, Any]) -> None:
    """Who asked for the lease hears once whether they have it."""
    if not lease.answered:
        lease.answered = True
        fleet.emit(Answer(lease.id, reply))


def refuse(fleet: FleetState, lease: Lease, error: GpuctlError) -> None:
    """Forget a lease that has not begun, and say why."""
    _forget(fleet, lease)
    _answer_refusal(fleet, lease, error)


def _answer_refusal(fleet: FleetState, lease: Lease, error: GpuctlError) -> None:
    reply = report.reply(lease.id, "lease_acquire", workers=[], duration_s=0.0)
    answer(fleet, lease, {**reply, "ok": False, "error": error.to_map()})
