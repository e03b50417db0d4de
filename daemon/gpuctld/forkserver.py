"""The process that workers are forked from.

It imports torch and diffusers once and never touches CUDA, so a worker is up in under a second
instead of the 5-14 s that the imports take. It is started before the controller imports torch
itself: the two then do it side by side.
"""

from __future__ import annotations

import multiprocessing.forkserver

PRELOAD = ["gpuctld.worker.tether", "gpuctld.worker.preload"]


def start() -> None:
    """Start it, without waiting for its imports. From the main thread: it ends with its starter."""
    multiprocessing.forkserver.set_forkserver_preload(PRELOAD)
    multiprocessing.forkserver.ensure_running()
