"""A client in another language, written from the document, works at the first try."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "node"
PROMPT = "a large red circle on a blue background"


@pytest.fixture(scope="module")
def node_client(tmp_path_factory):
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    for file in ("package.json", "client.mjs"):
        shutil.copy(EXAMPLE / file, folder)
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm install failed: {done.stderr.strip()[-200:]}")
    return folder / "client.mjs"


def test_node_loads_generates_and_unloads(daemon, node_client, tmp_path):
    picture = tmp_path / "circle.png"
    command = ["node", str(node_client), daemon.endpoint, "shapes", PROMPT, str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "step 10 of 10" in done.stderr
    assert Image.open(picture).size == (64, 64)
    assert daemon.states() == ["parked", "parked"]


def test_node_is_told_what_is_wrong(daemon, node_client, tmp_path):
    command = ["node", str(node_client), daemon.endpoint, "shaps", PROMPT, str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "did you mean 'shapes'?" in done.stderr
