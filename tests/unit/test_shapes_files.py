from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gpuctl.errors import BadModel
from gpuctl_demo import MODELS, model_path
from gpuctld import model_folder

RESULTS = Path(__file__).parents[2] / "training" / "results.json"
BUDGET = 16 * 1024 * 1024


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(model_path("shapes"), tmp_path / "shapes"))


def test_all_models_fit_the_budget():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= BUDGET


@pytest.mark.parametrize("name", ["shapes", "shapes-edit"])
def test_the_folder_is_one_that_the_daemon_accepts(name):
    model_folder.check(model_path(name))
    assert not list(model_path(name).rglob("*.bin"))


def test_a_missing_model_is_named():
    with pytest.raises(FileNotFoundError, match="nonesuch"):
        model_path("nonesuch")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: path.write_bytes(b""),
    ],
)
def test_damaged_weights_are_named(copy, spoil):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    spoil(weights)
    with pytest.raises(BadModel, match="unet"):
        model_folder.check(copy)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"../../../etc": ["diffusers", "UNet2DConditionModel"]}, "leaves the folder"),
        ({"unet": ["my_module", "Evil"]}, "code of its own"),
        ({"unet": ["diffusers", "UNet2DConditionModel"], "_class_name": 7}, "no pipeline class"),
    ],
)
def test_hostile_folders_are_refused(copy, change, word):
    index = copy / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **change}))
    with pytest.raises(BadModel, match=word):
        model_folder.check(copy)


def test_a_component_that_links_elsewhere_is_refused(copy, tmp_path):
    shutil.move(copy / "vae", tmp_path / "elsewhere")
    (copy / "vae").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadModel, match="leads out"):
        model_folder.check(copy)


def test_the_recorded_figures_reach_the_targets():
    """What the evaluation of the shipped files found; python -m training evaluate repeats it."""
    figures = json.loads(RESULTS.read_text())
    assert figures["text_to_image"]["n"] == 500
    assert figures["text_to_image"]["right"] >= 0.95
    assert set(figures["edits"]) == {"shape", "colour", "background", "size", "place"}
    assert min(each["right"] for each in figures["edits"].values()) >= 0.90
    assert figures["scorer"]["right_in_all"] >= 0.99
