"""Adapters through the daemon: named in the catalog, put on and taken off, there after anything."""

from __future__ import annotations

import os
import signal

import pytest

from gpuctl import GpuctlError
from gpuctl_demo import model_path
from tests.fakes import adapters
from tests.integration.daemon import states

CATALOG = """
[models.shapes.adapters.ink]
path = "{home}/ink/{file}"
[models.shapes.adapters.gone]
path = "{home}/gone.safetensors"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = tmp_path_factory.mktemp("loras")
    adapters.save(model_path("shapes"), made / "ink")
    return made


@pytest.fixture
def inked(own_daemon, home):
    """A daemon with ``shapes`` loaded and an adapter for it in the catalog."""
    daemon = own_daemon(2, more=CATALOG.format(home=home, file=adapters.FILE))
    daemon.client().load("shapes")
    return daemon


def carried(daemon):
    """Adapters of each worker."""
    return [row["adapters"] for row in daemon.client().lora_list("shapes")["workers"]]


def sizes(daemon):
    """Bytes of the model on each worker, in host memory."""
    return [worker["models"][0]["host_bytes"] for worker in daemon.client().status()["workers"]]


def test_what_people_type(inked):
    client = inked.client()
    plain, alone = inked.draw(0), sizes(inked)
    assert "no adapters" in inked.cli("lora", "list", "shapes").stdout
    inked.cli("lora", "add", "shapes", "ink", "--scale", "0.7")
    assert inked.cli("lora", "list", "shapes").stdout.count("ink at 0.7") == 2
    assert "shapes +ink@0.7 loaded" in inked.cli("status").stdout
    assert all(now > before for now, before in zip(sizes(inked), alone, strict=True))
    expected = inked.draw(0)
    assert expected != plain
    for _ in range(2):
        inked.cli("unload")
        inked.cli("reload", "--verify")
        assert inked.draw(0) == inked.draw(1) == expected
    client.unload()
    refused = inked.cli("lora", "add", "shapes", "ink", check=7)
    assert "gpuctl load shapes" in refused.stderr
    inked.cli("lora", "remove", "shapes", "ink")
    assert carried(inked) == [[], []]
    assert states(client.status()) == ["parked"] * 2
    client.reload(verify=True)
    assert inked.draw(0) == inked.draw(1) == plain
    assert sizes(inked) == alone


def test_an_adapter_comes_off_a_suspended_worker_which_stays_so(inked):
    client = inked.client()
    plain = inked.draw(0)
    client.lora_add("shapes", "ink")
    client.unload(suspend=True)
    client.lora_remove("shapes", "ink")
    assert [worker["state"] for worker in client.status()["workers"]] == ["suspended"] * 2
    client.reload()
    assert inked.draw(0) == plain


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_worker_that_dies_comes_back_with_its_adapters(inked, tier):
    client = inked.client()
    client.lora_add("shapes", "ink", 0.7)
    expected = inked.draw(0)
    if tier == "host":
        client.unload()
    victim = inked.worker_pids()[0]
    os.kill(victim, signal.SIGKILL)
    inked.wait_for(lambda status: status["workers"][0]["pid"] not in {0, victim})
    back = "parked" if tier == "host" else "loaded"
    inked.wait_for(lambda status: states(status) == [back] * 2)
    assert carried(inked) == [[{"name": "ink", "scale": 0.7}]] * 2
    client.reload()
    assert inked.draw(0) == inked.draw(1) == expected


def test_a_file_that_is_missing_is_named_and_the_model_stays(inked):
    plain = inked.draw(0)
    with pytest.raises(GpuctlError, match=r"gone\.safetensors is missing"):
        inked.client().lora_add("shapes", "gone")
    assert carried(inked) == [[], []]
    assert states(inked.client().status()) == ["loaded"] * 2
    assert inked.draw(0) == plain


def test_those_of_the_catalog_that_are_preloaded_come_with_the_model(own_daemon, home):
    more = CATALOG.format(home=home, file=adapters.FILE)
    gone = "[models.shapes.adapters.gone]"
    daemon = own_daemon(1, more=more.replace(gone, f"scale = 0.5\npreload = true\n{gone}"))
    daemon.client().load("shapes")
    assert carried(daemon) == [[{"name": "ink", "scale": 0.5}]]


def test_a_load_whose_adapter_is_missing_leaves_nothing_on_the_device(own_daemon, home):
    more = CATALOG.format(home=home, file=adapters.FILE) + "preload = true\n"
    daemon = own_daemon(1, more=more)
    for _ in range(2):
        with pytest.raises(GpuctlError, match=r"gone\.safetensors is missing"):
            daemon.client().load("shapes")
        assert states(daemon.client().status()) == ["absent"]
    (home / "gone.safetensors").symlink_to(home / "ink" / adapters.FILE)
    daemon.client().load("shapes")
    (home / "gone.safetensors").unlink()
    assert carried(daemon) == [[{"name": "gone", "scale": 1.0}]]
