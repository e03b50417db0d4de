"""The catalog's estimates, which a load is refused by before anything is read."""

from __future__ import annotations

import pytest
from tests.fakes import adapters

from gpuctl_demo import model_path
from gpuctld import config
from gpuctld.service import read_catalog

CONFIG = """
[models.plain]
path = "{model}"
[models.inked]
path = "{model}"
[models.inked.adapters.ink]
path = "{adapter}"
preload = {preload}
"""


@pytest.fixture
def file(tmp_path):
    return adapters.save(model_path("shapes"), tmp_path / "ink")


def sizes(adapter, preload):
    text = CONFIG.format(model=model_path("shapes"), adapter=adapter, preload=preload)
    models = read_catalog(config.parse(text))
    return models["plain"].estimated_bytes, models["inked"].estimated_bytes


@pytest.mark.parametrize("place", ["file", "folder"])
def test_adapters_that_come_with_a_model_count(file, place):
    plain, inked = sizes(file if place == "file" else file.parent, "true")
    assert plain > 0
    assert inked == plain + file.stat().st_size


def test_adapters_that_come_later_or_are_missing_do_not(file, tmp_path):
    plain, inked = sizes(file, "false")
    assert inked == plain
    plain, inked = sizes(tmp_path / "gone.safetensors", "true")
    assert inked == plain > 0
