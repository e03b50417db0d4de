"""Broadcast skew, and how fast ``status`` answers while all workers generate.

Skew: the time between the first and the last command of a broadcast leaving the controller, over
its own sockets. Status: round trips of a client on the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import zmq
from tests.integration.daemon import Daemon

from gpuctl import Job
from gpuctld.links import Links
from gpuctld.messages import UnloadModel

PROMPT = "a large red circle on a blue background"
STEPS = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=500)
    options = parser.parse_args()
    report("broadcast skew", broadcast_skews(options.workers, options.samples))
    with tempfile.TemporaryDirectory() as home:
        daemon = Daemon(Path(home), options.workers).start()
        try:
            daemon.client(timeout=300).load("shapes")
            report("status, idle", status_times(daemon, options.samples))
            with generating(daemon, options.workers):
                report("status, all generating", status_times(daemon, options.samples))
        finally:
            daemon.stop()
    return 0


class generating:  # noqa: N801  a context manager, used as one
    """Keeps every worker at work."""

    def __init__(self, daemon: Daemon, workers: int) -> None:
        self._daemon, self._workers = daemon, workers
        self._thread = threading.Thread(target=self._draw, daemon=True)

    def _draw(self) -> None:
        jobs = (
            Job("shapes", {"prompt": PROMPT, "num_inference_steps": STEPS}, seed=k)
            for k in range(4 * self._workers)
        )
        for _ in self._daemon.client(timeout=600).map(jobs, in_flight=2 * self._workers):
            pass

    def __enter__(self) -> None:
        self._thread.start()
        self._daemon.wait_for(lambda status: all(worker["job"] for worker in status["workers"]), 60)

    def __exit__(self, *_: object) -> None:
        self._daemon.client().unload(mode="abort")


def broadcast_skews(workers: int, samples: int) -> list[float]:
    """Seconds between the first and the last command of a broadcast, per broadcast."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with tempfile.TemporaryDirectory() as home:
        endpoints = {gpu: f"ipc://{home}/{gpu}" for gpu in range(workers)}
        ends = [context.socket(zmq.DEALER) for _ in endpoints]
        for end, endpoint in zip(ends, endpoints.values(), strict=True):
            end.bind(endpoint)
        links = Links(context, endpoints)
        for gpu in endpoints:
            links.open(gpu)
        skews = [_broadcast(links, ends) for _ in range(samples)]
        links.close_all()
        context.destroy(linger=0)
    return skews


def _broadcast(links: Links, ends: list[zmq.Socket[bytes]]) -> float:
    times = []
    for gpu in range(len(ends)):
        links.send(gpu, UnloadModel(task="skew", model="shapes", tier="host"), ())
        times.append(time.perf_counter())
    for end in ends:
        end.recv_multipart()
    return times[-1] - times[0]


def status_times(daemon: Daemon, samples: int) -> list[float]:
    """Seconds per round trip."""
    client, times = daemon.client(), []
    client.status()
    for _ in range(samples):
        started = time.perf_counter()
        client.status()
        times.append(time.perf_counter() - started)
    return times


def report(what: str, times: list[float]) -> None:
    ordered = sorted(times)
    p99 = ordered[int(0.99 * len(ordered))]
    median = statistics.median(ordered)
    print(f"{what}: p50 {median * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms, n {len(ordered)}")


if __name__ == "__main__":
    sys.exit(main())
