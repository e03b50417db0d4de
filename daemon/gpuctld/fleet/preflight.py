"""Whether all of an operation fits, asked before any of it moves."""

from __future__ import annotations

from typing import Any

from gpuctl.errors import DeviceMemory
from gpuctl.residency import DOWN
from gpuctld.fleet import outcomes, placement
from gpuctld.fleet.effects import Send
from gpuctld.fleet.state import FleetState, Operation, Step
from gpuctld.messages import Probe

REPROBE_S = 0.1


def passed(fleet: FleetState, operation: Operation, now: float) -> bool:
    """Check all GPUs before the first transfer, so that a move is all or none.

    True when steps may be sent. Workers that are not ready are probed when they are.
    """
    if operation.probes is None:
        return True
    asked = {step.gpu for step in operation.unfinished if _takes_memory(fleet, step)}
    for gpu in sorted(asked - operation.probes.keys()):
        if fleet.workers[gpu].up and now >= operation.probe_at:
            operation.probes[gpu] = None
            fleet.emit(Send(gpu, Probe(task=operation.id)))
    if any(operation.probes.get(gpu) is None for gpu in asked):
        return False
    return _all_fit(fleet, operation, asked, now)


def _takes_memory(fleet: FleetState, step: Step) -> bool:
    """On a worker that is down it takes nothing: the step will fail by itself."""
    down = fleet.workers[step.gpu].state in DOWN
    return not down and placement.needed_bytes(fleet, step) > 0


def _all_fit(fleet: FleetState, operation: Operation, gpus: set[int], now: float) -> bool:
    short = {gpu: error for gpu in gpus if (error := _shortage(fleet, operation, gpu)) is not None}
    if not short:
        operation.probes = None
        return True
    if now < operation.wait_until:
        operation.probes = {}
        operation.probe_at = now + REPROBE_S
        return False
    first = next(iter(short.values()))
    for step in operation.unfinished:
        outcomes.end(fleet, step, now, short.get(step.gpu, _held_back(first)))
    return False


def _shortage(fleet: FleetState, operation: Operation, gpu: int) -> DeviceMemory | None:
    steps = [step for step in operation.unfinished if step.gpu == gpu]
    need = sum(placement.needed_bytes(fleet, step) for step in steps)
    probe = (operation.probes or {})[gpu]
    return placement.shortage(fleet.workers[gpu], need, probe) if probe else None


def _held_back(error: DeviceMemory) -> DeviceMemory:
    return DeviceMemory(f"held back: {error.message}", error.hint)


def probed(fleet: FleetState, operation_id: str, gpu: int, probe: dict[str, Any]) -> None:
    """A worker has sampled its device."""
    operation = fleet.operation(operation_id)
    if operation is not None and operation.probes is not None:
        operation.probes[gpu] = probe


def forget_probes(fleet: FleetState, gpu: int) -> None:
    """A worker has died and will not answer: ask the next one."""
    for operation in fleet.operations:
        if operation.probes is not None:
            operation.probes.pop(gpu, None)
