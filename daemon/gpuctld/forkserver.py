"""The process that workers are forked from.

It imports torch and diffusers once and never touches CUDA, so a worker is up in under a second
instead of the 5-14 s that the imports take. It is started before the controller imports torch
itself: the two then do it side by side.
"""

from __future__ import annotations

import multiprocessing.forkserver
import multiprocessing.resource_tracker

PRELOAD = ["gpuctld.worker.tether", "gpuctld.worker.preload"]


def start() -> None:
    """Start it, without waiting for its imports. From the main thread: it ends with its starter."""
    multiprocessing.forkserver.set_forkserver_preload(PRELOAD)
    multiprocessing.forkserver.ensure_running()


def stop() -> None:
    """End it and the tracker that it brought along, and wait for both; no worker may be left.

    Both would end by themselves, but a little after the daemon, whose end promises that no
    process of it is left. The library has no public way to wait for that.
    """
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]  # noqa: SLF001
    multiprocessing.resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # noqa: SLF001
