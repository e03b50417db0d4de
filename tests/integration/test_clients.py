"""Clients of every kind against a real daemon."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgpack
import pytest
import zmq

from gpuctl import AsyncClient, Client, GpuctlError, Job
from gpuctl.errors import BadConfig, NoDaemon, UnknownModel
from tests.integration.daemon import states

PROMPT = "a small green star on a white background"
EXAMPLE = Path(__file__).parents[2] / "examples" / "benchmark_loop.py"


def test_the_async_client_does_the_same(daemon):
    async def use() -> None:
        async with AsyncClient(daemon.endpoint, timeout=60) as client:
            before, again = await asyncio.gather(
                client.generate("shapes", PROMPT, seed=3),
                client.generate("shapes", PROMPT, seed=3),
            )
            assert before[0].tobytes() == again[0].tobytes()
            await client.unload()
            assert states(await client.status()) == ["parked", "parked"]
            await client.reload()
            jobs = [Job("shapes", {"prompt": PROMPT}, seed=k, name=str(k)) for k in range(3)]
            names = {job.name async for job, images in client.map(jobs) if images[0].width == 64}
            assert names == {"0", "1", "2"}
            async with client.unloaded():
                assert states(await client.status()) == ["parked", "parked"]
            assert states(await client.status()) == ["loaded", "loaded"]
            with pytest.raises(UnknownModel, match="shaps"):
                await client.load("shaps")

    asyncio.run(use())


def test_the_async_client_streams_events_and_cancels(daemon):
    async def use() -> None:
        async with AsyncClient(daemon.endpoint, timeout=60) as client:
            drawing = asyncio.create_task(
                client.generate("shapes", PROMPT, num_inference_steps=900)
            )
            async for event in client.events():
                if event["event"] == "job" and event["step"] > 2:
                    break
            drawing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await drawing

    asyncio.run(use())
    daemon.wait_for(lambda status: not any(w["job"] for w in status["workers"]), 5)


def test_nobody_there_is_said_by_both_clients(tmp_path):
    nobody = f"ipc://{tmp_path}/nobody.sock"
    with pytest.raises(NoDaemon):
        Client(nobody).status()
    with pytest.raises(NoDaemon):
        asyncio.run(AsyncClient(nobody).status())


@pytest.mark.parametrize(
    "wrong", ["gpuctl.sock", "ipc://", "http://host", f"ipc:///tmp/{'x' * 120}"]
)
def test_an_endpoint_that_is_none_is_said_by_both_clients(wrong):
    with pytest.raises(BadConfig, match=wrong):
        Client(wrong).status()
    with pytest.raises(BadConfig):
        asyncio.run(AsyncClient(wrong).status())


def test_a_daemon_that_does_not_answer_costs_no_more_than_the_timeout(tmp_path):
    endpoint = f"ipc://{tmp_path}/silent.sock"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as silent:
        silent.bind(endpoint)
        began = time.monotonic()
        with pytest.raises(NoDaemon):
            Client(endpoint, timeout=0.3).status()
        assert time.monotonic() - began < 1
        silent.linger = 0


def test_a_req_socket_is_served(daemon):
    context = zmq.Context()
    socket = context.socket(zmq.REQ)
    socket.connect(daemon.endpoint)
    for _ in range(3):
        socket.send_multipart([b"gpuctl/1", msgpack.packb({"op": "ping", "id": "r"})])
        assert socket.poll(5000)
        version, body = socket.recv_multipart()
        assert version == b"gpuctl/1"
        assert msgpack.unpackb(body)["ok"]
    context.destroy(linger=0)


def raw(daemon, *frames: bytes, seconds: float = 0.3) -> dict | None:
    """What the daemon answers to raw frames."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(daemon.endpoint)
    socket.send_multipart(frames)
    answer = None
    while answer is None and socket.poll(seconds * 1000):
        heard = msgpack.unpackb(socket.recv_multipart()[1])
        answer = None if "event" in heard else heard  # a word that it still works is no answer
    context.destroy(linger=0)
    return answer


def test_malformed_messages_are_answered_or_counted_and_hurt_nobody(daemon):
    before = daemon.client().status()["daemon"]["refused_messages"]
    assert raw(daemon, b"nonsense") is None
    assert raw(daemon, b"gpuctl/9", msgpack.packb({"op": "ping", "id": "a"})) is None
    assert raw(daemon, b"gpuctl/1", b"\xc1") is None
    assert raw(daemon, b"gpuctl/1", *[b"x"] * 100) is None
    answer = raw(daemon, b"gpuctl/1", msgpack.packb({"op": "load", "id": "a", "gups": 1}))
    assert answer["error"]["code"] == "bad_request"
    assert daemon.client().status()["daemon"]["refused_messages"] == before + 4


def test_the_same_id_is_answered_from_the_record_and_never_run_twice(daemon):
    body = msgpack.packb(
        {"op": "generate", "id": "once", "model": "shapes", "params": {"prompt": PROMPT}}
    )
    first = raw(daemon, b"gpuctl/1", body, seconds=20)
    started = time.perf_counter()
    second = raw(daemon, b"gpuctl/1", body, seconds=20)
    assert first == second
    assert time.perf_counter() - started < 0.2
    other = msgpack.packb({"op": "unload", "id": "once"})
    assert raw(daemon, b"gpuctl/1", other)["error"]["code"] == "bad_request"


@pytest.mark.timeout(120)
def test_a_daemon_that_restarts_is_found_again(own_daemon):
    daemon = own_daemon(1)
    client = daemon.client()
    client.load("shapes")
    assert daemon.stop() == 0
    with pytest.raises(GpuctlError):
        client.generate("shapes", PROMPT)
    daemon.start()
    daemon.wait_for(lambda status: states(status) == ["loaded"])
    assert client.generate("shapes", PROMPT)[0].width == 64


@pytest.mark.timeout(120)
def test_a_stop_lets_the_running_job_finish_and_leaves_nothing(own_daemon):
    daemon = own_daemon(2, fork_servers=None)
    daemon.client().load("shapes")
    images: list = []
    draw = threading.Thread(
        target=lambda: images.extend(
            daemon.client().generate("shapes", PROMPT, num_inference_steps=40)
        )
    )
    draw.start()
    daemon.wait_for(lambda status: any(worker["job"] for worker in status["workers"]))
    session = daemon.process.pid
    assert daemon.stop(signal.SIGTERM) == 0
    draw.join()
    assert len(images) == 1
    assert _members(session) == []
    assert not list(daemon.home.glob("*.sock"))


def _members(session: int) -> list[str]:
    """Command lines of the processes of a session."""
    found = subprocess.run(
        ["ps", "-o", "args=", "-s", str(session)], capture_output=True, text=True, check=False
    )
    return found.stdout.split("\n")[:-1]


def test_events_on_the_command_line_are_json_lines(daemon):
    process = daemon.popen("events", stdout=subprocess.PIPE)
    lines: list[dict] = []
    reader = threading.Thread(
        target=lambda: lines.extend(json.loads(line) for line in process.stdout)
    )
    reader.start()
    deadline = time.monotonic() + 10
    while not lines and time.monotonic() < deadline:
        daemon.client().unload()
        daemon.client().reload()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    reader.join()
    assert {"residency", "move"} <= {event["event"] for event in lines}


def test_the_example_loop_runs(daemon):
    command = [sys.executable, str(EXAMPLE), "shapes-edit", "--rounds", "1", "--images", "2"]
    done = subprocess.run(
        command, env=daemon.environ, capture_output=True, text=True, check=False, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert "without the model" in done.stdout


def test_a_lease_with_a_time_to_live_is_renewed_while_its_body_runs(daemon):
    with daemon.client().lease(ttl_s=0.6) as lease:
        time.sleep(1.5)
        assert [each["id"] for each in daemon.client().status()["leases"]] == [lease["id"]]
    assert not daemon.client().status()["leases"]


def test_the_asyncio_client_renews_its_lease(daemon):
    async def hold():
        async with AsyncClient(daemon.endpoint) as client, client.lease(ttl_s=0.6) as lease:
            await asyncio.sleep(1.5)
            held = (await client.status())["leases"]
            assert [each["id"] for each in held] == [lease["id"]]

    asyncio.run(hold())
    assert not daemon.client().status()["leases"]
