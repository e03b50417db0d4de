"""What outlives the daemon: which models shall be where, and whose the GPUs are."""

from __future__ import annotations

import attrs

from gpuctl.residency import Tier
from gpuctld.fleet.events import Peer
from gpuctld.fleet.state import FleetState, Lease, LeaseState

Wanted = dict[int, dict[str, Tier]]
"""By GPU: the tier that each model shall be in."""

Restore = dict[int, list[str]]
"""By GPU: the models that come back at the end of a lease."""


@attrs.frozen(kw_only=True)
class KeptLease:
    """A lease in force. ``asked_at``: on the monotonic clock, which a restart does not set back."""

    id: str
    gpus: list[int]
    holder: Peer
    command: str
    queue_jobs: bool
    ttl_s: float | None
    asked_at: float
    restore: Restore


@attrs.frozen(kw_only=True)
class Snapshot:
    """The part of a fleet's state that a restarted daemon needs.

    ``suspended``: the GPUs whose worker shall have no context there.
    """

    wanted: Wanted = attrs.field(factory=dict)
    suspended: list[int] = attrs.field(factory=list)
    leases: list[KeptLease] = attrs.field(factory=list)

    def without_leases(self) -> Snapshot:
        """As after a reboot, which no holder survives: what they were to give back is wanted."""
        wanted = _copy(self.wanted)
        for lease in self.leases:
            _want_back(wanted, lease.restore)
        return attrs.evolve(self, wanted=wanted, leases=[])


def take(fleet: FleetState) -> Snapshot:
    """The fleet's snapshot.

    Only leases in force are in it. Those that begin were not granted yet and those that end are as
    good as over, so their models are wanted back.
    """
    wanted = _copy({worker.gpu: worker.wanted for worker in fleet.workers.values()})
    kept = []
    for lease in fleet.leases.values():
        if lease.state is LeaseState.HELD:
            kept.append(_keep(lease))
        else:
            _want_back(wanted, lease.restore)
    return Snapshot(
        wanted={gpu: models for gpu, models in wanted.items() if models},
        suspended=[worker.gpu for worker in fleet.workers.values() if worker.suspend_wanted],
        leases=kept,
    )


def _copy(wanted: Wanted) -> Wanted:
    return {gpu: dict(models) for gpu, models in wanted.items()}


def _want_back(wanted: Wanted, restore: Restore) -> None:
    for gpu, names in restore.items():
        wanted.setdefault(gpu, {}).update(dict.fromkeys(names, Tier.DEVICE))


def _keep(lease: Lease) -> KeptLease:
    return KeptLease(
        id=lease.id,
        gpus=lease.gpus,
        holder=lease.holder,
        command=lease.command,
        queue_jobs=lease.queue_jobs,
        ttl_s=lease.ttl_s,
        asked_at=lease.asked_at,
        restore=lease.restore,
    )
