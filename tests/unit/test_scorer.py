from __future__ import annotations

import torch

from gpuctl_demo import model_path, scenes
from gpuctl_demo.drawing import Jitter, render
from gpuctl_demo.scorer import Scorer, right

UNSEEN_SEED = 424242


def test_the_scorer_reads_unseen_drawings():
    torch.set_num_threads(1)
    wanted = list(scenes.all_scenes())
    jitter = Jitter.random(len(wanted), torch.Generator().manual_seed(UNSEEN_SEED))
    seen = Scorer.load().judge_tensor(render(wanted, jitter))
    hits = sum(right(found, scene) for found, scene in zip(seen, wanted, strict=True))
    assert hits / len(wanted) >= 0.99


def test_the_scorer_can_be_wrong():
    scene = scenes.Scene("circle", "red", "blue")
    other = scenes.Scene("star", "red", "blue")
    [seen] = Scorer.load().judge_tensor(render([scene]))
    assert right(seen, scene)
    assert not right(seen, other)
    assert right(seen, other, ["colour", "background"])


def test_the_scorer_is_small():
    assert model_path("scorer").stat().st_size < 1_000_000
