"""The fleet: a pure state machine of workers, models, jobs and leases.

``Fleet.apply(event, now)`` takes what happened and returns what to do. No clock, socket, process,
lock or torch inside: the controller supplies the first and carries out the second. The shape
follows dask distributed's ``worker_state_machine`` (events in, instructions out).
"""

from gpuctld.fleet.machine import Fleet

__all__ = ["Fleet"]
