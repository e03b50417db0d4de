"""benchmarks/weights.py without a GPU: the order of its turns, and a run that was cut off."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
from benchmarks import weights, weights_report
from benchmarks.weights_results import Results

from tests.integration.daemon import ROOT

GPUS = 2
ABOUT = {"date": "2026-01-01", "host": "2 x Test", "command": "test", "gpus": GPUS, "bytes": 2**35}
ANSWERS = {
    "build": {"slab_bytes": 2**35},
    "forward": {"seconds": 0.1, "equal": True},
    "memory": {"used": 2**29, "context": 2**28},
    "steps": [1.0] * 100,
    "floor": {"seconds": 0.1},
}


IN_ORDER = [
    "ours_reload",
    "floor",
    "verified_reload",
    "suspend",
    "neighbour_cycles",
    "module_threads_reload",
    "module_processes_reload",
    "checkpoint_reload",
    "saver_reload",
]
"""What everybody wants to know comes first, and the slow arms last."""


class FakeArm:
    """Answers at once; ``log`` has what all of them were asked for.

    ``breaks``: what the arms that move by ``.to()`` die of.
    """

    log: list[tuple[str, str]]
    breaks = ""

    def __init__(self, arm, gpus, *_):
        self._name, self._asked = f"{arm.__name__}-{gpus}", []
        self._dead = False

    def send(self, name, **keywords):
        self.log.append((self._name, name))
        self._asked.append(name)

    def receive(self):
        name = self._asked.pop(0)
        self._dead = self._dead or (name == self.breaks and "ModuleTo" in self._name)
        if self._dead:
            raise weights.ArmFailed("it broke")
        return ANSWERS.get(name, {"seconds": 0.1})

    def call(self, name, **keywords):
        self.send(name, **keywords)
        return self.receive()

    def end(self):
        self.log.append((self._name, "end"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A whole run with two cycles of each arm; the results, and what the arms were asked for."""

    def go(breaks=""):
        fake = type("Fake", (FakeArm,), {"log": [], "breaks": breaks})
        monkeypatch.setattr(weights, "Arm", fake)
        monkeypatch.setattr(weights, "_nvml_used", lambda: 0)
        monkeypatch.setattr(weights, "_about", lambda *_: ABOUT)
        monkeypatch.setattr(weights.importlib.util, "find_spec", lambda _: True)
        options = argparse.Namespace(cycles=2, others=2, scale=1.0, out=tmp_path)
        weights.Bench(GPUS, options, tmp_path).run()
        return json.loads((tmp_path / "results.json").read_text()), fake.log

    return go


def others(log):
    """What the first process of each other arm was asked for."""
    return [asked for asked in log if asked[0] in {"ModuleTo-0,1", "ModuleTo-0", "Saver-0"}]


def test_every_arm_takes_its_turns_and_the_slow_ones_come_last(run):
    results, log = run()
    assert results["complete"]
    counts = {name: len(samples) for name, samples in results["found"].items()}
    for arm in ("module_threads", "module_processes", "checkpoint", "saver", "ours_alone"):
        assert counts[f"{arm}_unload"] == counts[f"{arm}_reload"] == 2
    assert counts["ours_reload"] == 7
    order = [name for name in results["found"] if name in IN_ORDER]
    assert order == IN_ORDER
    verbs = [verb for name, verb in others(log) if name == "ModuleTo-0"]
    cycle, checkpoint = ["unload", "reload"], ["suspend", "wake"]
    assert verbs == ["reload", *cycle, *checkpoint, *checkpoint, *cycle, "end"]


def test_an_arm_that_fails_is_named_and_the_others_are_measured(run):
    results, _ = run(breaks="wake")
    assert results["failed"] == {"checkpoint": "it broke", "module_processes": "it broke"}
    assert len(results["found"]["module_processes_reload"]) == 1
    assert "saver_reload" in results["found"]
    text = weights_report.markdown(results)
    assert "checkpoint ended with: it broke" in text
    assert "| checkpoint_unload | 0 | not measured |" in text


def test_a_run_that_was_cut_off_anywhere_has_a_table(run):
    results, _ = run()
    whole = weights_report.markdown(results)
    assert "not measured" not in whole
    assert "cut off" not in whole
    names = list(results["found"])
    for length in range(len(names)):
        found = {name: results["found"][name] for name in names[:length]}
        text = weights_report.markdown({**results, "complete": False, "found": found})
        assert "cut off" in text
        assert "not measured" in text


def test_the_table_is_made_later_from_the_file_alone(tmp_path):
    path = tmp_path / "results.json"
    found = Results(path, ABOUT)
    found.note("ours_unload", {"seconds": 0.04, "answers": []})
    found.note("ours_reload", {"seconds": 0.4, "answers": []})
    found.note("module_threads_unload", {"seconds": 20.0, "answers": []})
    table = tmp_path / "table.md"
    script = [sys.executable, ROOT / "benchmarks" / "weights_report.py", path]
    subprocess.run([*script, "--out", tmp_path, "--table", table], check=True, cwd=tmp_path)
    text = table.read_text()
    assert "| unload to driver-confirmed free | <= 80 ms | 40 ms | yes |" in text
    assert "| unload against .to() in threads | >= 150 x | 500.0 x | yes |" in text
    assert "| reload against .to() in threads | >= 7 x | not measured | - |" in text
    assert "| suspend | <= 0.8 s | not measured | - |" in text
    assert "cut off" in text


def test_what_was_found_is_on_disk_after_each_sample(tmp_path):
    path = tmp_path / "results.json"
    found = Results(path, ABOUT)
    for count in range(1, 4):
        found.note("floor", {"seconds": 0.1})
        assert len(json.loads(path.read_text())["found"]["floor"]) == count
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]
