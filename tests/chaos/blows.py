"""What can befall a worker."""

from __future__ import annotations

import signal

import attrs


@attrs.frozen
class Blow:
    """Sends a signal to a worker, or has it fail by itself as ``tests.fakes.faulty_worker`` can."""

    name: str
    signal: int | None = None
    fault: dict | None = None


KILL = Blow("kill", signal.SIGKILL)
"""As the kernel does when memory runs out."""
STOP = Blow("stop", signal.SIGSTOP)
"""The process is there and does nothing."""
STICKY = Blow(
    "sticky",
    fault={"command": "RunJob", "raise": "CUDA error: an illegal memory access was encountered"},
)
"""After such an error nothing works in the process any more."""
CUDA = Blow("cuda", fault={"command": "RunJob", "poison": True})
"""The same in earnest."""
