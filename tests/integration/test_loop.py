"""The loop itself: seeded images, memory, meaning; real processes, real pipelines."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from PIL import Image

from gpuctl import GpuctlError, Job
from gpuctl_demo import scenes
from gpuctl_demo.drawing import draw
from gpuctl_demo.scorer import Scorer, right
from tests.integration.daemon import states

PROMPT = "a large red circle on a blue background"


def image_on(client, gpu, seed=7):
    [image] = client.generate("shapes", PROMPT, seed=seed, options={"gpu": gpu})
    return image.tobytes()


@pytest.mark.timeout(180)
def test_a_seeded_image_is_the_same_over_twenty_cycles_and_on_both_workers(daemon):
    client = daemon.client()
    before = image_on(client, 0)
    assert image_on(client, 1) == before
    for cycle in range(20):
        client.unload()
        client.reload(verify=cycle % 5 == 0)
        assert image_on(client, cycle % 2) == before
    assert image_on(client, 0) == image_on(client, 1) == before
    assert image_on(client, 0, seed=8) != before


@pytest.mark.timeout(180)
def test_images_mean_what_was_asked_before_an_unload_and_after_a_reload(daemon):
    client = daemon.client()
    client.load("shapes-edit")
    assert _right_images(client) >= 22
    client.unload()
    assert set(states(client.status())) == {"parked"}
    client.reload()
    assert _right_images(client) >= 22


def _right_images(client) -> int:
    """How many of twelve prompts and twelve edits are drawn right."""
    prompts = scenes.prompts(12, 3)
    asked = [
        edit for name in ("colour", "shape", "background") for edit in scenes.edits(name, 4, 3)
    ]
    jobs = [Job("shapes", {"prompt": p.text}, seed=k, name=f"p{k}") for k, p in enumerate(prompts)]
    jobs += [
        Job("shapes-edit", {"prompt": e.instruction}, {"image": draw(e.before)}, k, name=f"e{k}")
        for k, e in enumerate(asked)
    ]
    drawn = {job.name: images[0] for job, images in client.map(jobs)}
    scorer = Scorer.load()
    hits = 0
    for k, prompt in enumerate(prompts):
        [seen] = scorer.judge([drawn[f"p{k}"]])
        hits += right(seen, prompt.scene, scenes.MAIN_ATTRIBUTES)
    for k, edit in enumerate(asked):
        [seen] = scorer.judge([drawn[f"e{k}"]])
        hits += right(seen, edit.after)
    return hits


def _private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def test_the_workers_memory_falls_by_the_weights_and_does_not_grow(daemon):
    client = daemon.client()
    image_on(client, 0)
    pid = daemon.worker_pids()[0]
    loaded = _private_bytes(pid)
    weights = client.unload()["workers"][0]["device_bytes"]
    assert loaded - _private_bytes(pid) >= 0.9 * weights
    sizes = []
    for _ in range(50):
        client.reload()
        client.unload()
        sizes.append(_private_bytes(pid))
    client.reload()
    assert sizes[-1] - sizes[4] < 2 * 1024 * 1024


def test_map_yields_in_order_of_completion_over_all_workers(daemon):
    jobs = [Job("shapes", {"prompt": PROMPT}, seed=k, name=str(k)) for k in range(6)]
    jobs.insert(2, Job("shapes", {"promt": "x"}, name="wrong"))
    outcomes = {job.name: outcome for job, outcome in daemon.client().map(jobs)}
    assert isinstance(outcomes.pop("wrong"), GpuctlError)
    assert all(isinstance(images[0], Image.Image) for images in outcomes.values())
    assert len(outcomes) == 6


def test_unloaded_reloads_also_when_the_body_raises(daemon):
    client = daemon.client()
    with pytest.raises(ZeroDivisionError), client.unloaded():
        assert daemon.states() == ["parked", "parked"]
        1 / 0  # noqa: B018
    assert daemon.states() == ["loaded", "loaded"]


def test_unload_waits_for_the_running_job(daemon):
    done: list[str] = []

    def draw_one() -> None:
        daemon.client().generate("shapes", PROMPT, num_inference_steps=25)
        done.append("image")

    thread = threading.Thread(target=draw_one)
    thread.start()
    daemon.wait_for(lambda status: any(worker["job"] for worker in status["workers"]))
    daemon.client().unload()
    done.append("unload")
    thread.join()
    assert done == ["image", "unload"]


def test_unload_abort_cancels_within_a_step(daemon):
    failures: list[str] = []

    def draw_one() -> None:
        try:
            daemon.client().generate("shapes", PROMPT, num_inference_steps=400)
        except GpuctlError as error:
            failures.append(error.code)

    thread = threading.Thread(target=draw_one)
    thread.start()
    daemon.wait_for(lambda status: any(worker["job"] for worker in status["workers"]))
    reply = daemon.client().unload(mode="abort")
    thread.join()
    assert failures == ["cancelled"]
    assert reply["duration_s"] < 2


@pytest.mark.parametrize("choice", ["wait", "reload"])
def test_a_job_for_a_parked_model_does_what_its_caller_chose(daemon, choice):
    client = daemon.client()
    client.unload()
    with pytest.raises(GpuctlError, match="parked"):
        client.generate("shapes", PROMPT)
    images: list[Image.Image] = []

    def draw_one() -> None:
        options = {"on_parked": choice}
        images.extend(daemon.client().generate("shapes", PROMPT, options=options))

    thread = threading.Thread(target=draw_one)
    thread.start()
    if choice == "wait":
        daemon.wait_for(lambda status: status["jobs"])
        client.reload()
    thread.join()
    assert len(images) == 1


def test_events_tell_of_moves_and_jobs(daemon):
    seen: list[dict] = []
    listening = threading.Event()

    def listen() -> None:
        for event in daemon.client().events():
            seen.append(event)
            listening.set()
            if event["event"] == "job" and event["state"] == "done":
                return

    thread = threading.Thread(target=listen)
    thread.start()
    client = daemon.client()
    while not listening.wait(0.1):
        client.unload()
        client.reload()
    client.generate("shapes", PROMPT)
    thread.join()
    assert {"move", "residency", "job"} <= {event["event"] for event in seen}
    numbers = [event["seq"] for event in seen if event["seq"]]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
