"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import gpuctl
from gpuctl_demo import scenes
from gpuctl_demo.drawing import draw
from tests.integration.daemon import CLI

PROMPT = "a small green star on a white background"


def test_every_move_is_printed(daemon):
    out = daemon.cli("unload").stdout.splitlines()
    assert out[0].startswith("gpu 0  shapes  device -> host  ")
    assert out[-1].endswith("on 2 GPUs")
    assert "host -> device" in daemon.cli("wake").stdout
    assert "nothing to do" in daemon.cli("load", "shapes").stdout


def test_json_is_one_document(daemon):
    for words in (["status"], ["models"], ["unload"], ["reload"], ["lease", "list"], ["doctor"]):
        document = json.loads(daemon.cli(*words, "--json").stdout)
        assert document["schema"] == 1


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["load", "shaps"], 8, "did you mean 'shapes'?"),
        (["load", "shapes", "--gpu", "7"], 8, "owns 0, 1"),
        (["lod", "shapes"], 2, "Did you mean 'load'?"),
        (["unload", "shapes", "--all"], 2, "not both"),
        (["generate", "shapes", "x", "--set", "promt=y"], 2, "did you mean 'prompt'?"),
        (["generate", "shapes", "x", "--set", "generator=1"], 2, "set by gpuctl"),
        (["generate", "shapes-edit", "x"], 7, "gpuctl load shapes-edit"),
        (["reload", "shapes-edit"], 7, "gpuctl load shapes-edit"),
        (["edit", "shapes", "/nowhere.png", "x"], 2, "No such file"),
        (["lease", "release", "nope"], 2, "no lease"),
        (["run", "--need", "9999GiB", "--", "true"], 5, "asked"),
        (["run", "--gpu", "9", "--", "true"], 8, "no GPU 9"),
        (["run", "--", "no-such-command"], 127, "not found"),
        (["phase", "nope"], 2, "no phase"),
        (["cancel", "nope"], 2, "nothing under way"),
    ],
)
def test_bad_input_is_answered_in_a_sentence_and_the_daemon_goes_on(daemon, words, status, says):
    done = daemon.cli(*words, check=status)
    assert says in done.stderr
    assert daemon.states() == ["loaded", "loaded"]


def test_pictures_that_are_none(daemon, tmp_path):
    daemon.client().load("shapes-edit")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    assert (
        "not a readable image" in daemon.cli("edit", "shapes-edit", str(text), "x", check=2).stderr
    )
    huge = tmp_path / "huge.png"
    _write_huge(huge)
    assert "pixels" in daemon.cli("edit", "shapes-edit", str(huge), "x", check=2).stderr


def _write_huge(path):
    from PIL import Image  # noqa: PLC0415

    Image.new("1", (12_000, 12_000)).save(path)


def test_the_version_is_told_without_a_daemon(tmp_path):
    environ = {**os.environ, "GPUCTL_SOCKET": f"ipc://{tmp_path}/nobody.sock"}
    words = [*CLI, "--version"]
    told = subprocess.run(words, env=environ, capture_output=True, text=True, check=True).stdout
    assert told == f"gpuctl {gpuctl.__version__}\n"


def test_without_a_daemon(tmp_path):
    environ = {**os.environ, "GPUCTL_SOCKET": f"ipc://{tmp_path}/nobody.sock"}
    words = [*CLI, "status"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "gpuctl serve" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_configuration_is_named_with_line_and_spelling(daemon, tmp_path):
    wrong = tmp_path / "config.toml"
    wrong.write_text("[daemon]\n\ndevicez = 3\n")
    done = daemon.cli("config", "check", str(wrong), check=78)
    assert "line 3" in done.stderr
    assert "did you mean 'devices'?" in done.stderr


def test_corrupt_weights_are_named(own_daemon, tmp_path):
    import shutil  # noqa: PLC0415

    from gpuctl_demo import model_path  # noqa: PLC0415

    copy = tmp_path / "broken"
    shutil.copytree(model_path("shapes"), copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    daemon = own_daemon(2, more=f'[models.broken]\npath = "{copy}"\n')
    done = daemon.cli("load", "broken", check=1)
    assert "unet/diffusion_pytorch_model.safetensors" in done.stderr
    assert daemon.states("broken") == ["absent", "absent"]
    daemon.cli("load", "shapes")


def test_jobs_of_a_file_go_on_where_they_were_interrupted(daemon, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    lines = [{"name": f"n{k}", "prompt": PROMPT, "seed": k} for k in range(4)]
    jobs.write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "out"
    words = ["generate", "shapes", "--jobs", str(jobs), "--out", str(out)]
    assert "4 done, 0 failed" in daemon.cli(*words).stdout
    (out / "n2.png").unlink()
    again = daemon.cli(*words)
    assert "3 of 4 are there already" in again.stderr
    assert "1 done" in again.stdout
    assert sorted(path.name for path in out.iterdir()) == [f"n{k}.png" for k in range(4)]


def test_edit_writes_its_image(daemon, tmp_path):
    daemon.client().load("shapes-edit")
    [edit] = scenes.edits("colour", 1, 1)
    before = tmp_path / "before.png"
    draw(edit.before).save(before)
    out = tmp_path / "after.png"
    daemon.cli("edit", "shapes-edit", str(before), edit.instruction, "--out", str(out))
    assert out.stat().st_size > 100


def test_interrupt_cancels_at_the_daemon(daemon):
    process = daemon.popen("generate", "shapes", PROMPT, "--steps", "900", stderr=subprocess.PIPE)
    daemon.wait_for(lambda status: any(worker["job"] for worker in status["workers"]))
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    daemon.wait_for(lambda status: not any(worker["job"] for worker in status["workers"]), 5)


def test_a_killed_client_takes_its_job_with_it(daemon):
    process = daemon.popen("generate", "shapes", PROMPT, "--steps", "900")
    daemon.wait_for(lambda status: any(worker["job"] for worker in status["workers"]))
    process.kill()
    process.wait()
    daemon.wait_for(lambda status: not any(worker["job"] for worker in status["workers"]), 5)


def test_status_answers_in_a_blink(daemon):
    times = []
    for _ in range(7):
        started = time.perf_counter()
        daemon.cli("status", "--json")
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3


def test_the_client_loads_no_torch():
    code = "import sys, gpuctl, gpuctl.client, gpuctl.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_completion_scripts(daemon):
    for shell in ("bash", "zsh", "fish"):
        assert "_GPUCTL_COMPLETE" in daemon.cli("completion", shell).stdout


def test_a_second_daemon_leaves_at_once_with_the_first_ones_pid(daemon):
    started = time.monotonic()
    done = daemon.cli("serve", "--config", str(daemon.config), "--devices", "cpu", check=7)
    assert str(daemon.process.pid) in done.stderr
    assert time.monotonic() - started < 3


def test_a_model_over_the_host_budget_is_refused_before_anything_is_read(own_daemon):
    daemon = own_daemon(1)
    assert daemon.stop() == 0
    config = daemon.config.read_text()
    daemon.config.write_text(config.replace("[daemon]", '[daemon]\nhost_budget = "1MiB"'))
    daemon.start()
    refused = daemon.cli("load", "shapes", check=6)
    assert "host_budget" in refused.stderr
    assert daemon.states() == ["absent"]
