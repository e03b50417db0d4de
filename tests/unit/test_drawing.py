from __future__ import annotations

import random

import pytest
import torch

from gpuctl_demo import drawing, scenes
from gpuctl_demo.scenes import ATTRIBUTES, COLOURS, Scene


def pixel(image, x, y):
    return image.getpixel((x, y))


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_drawing_has_its_colours_where_the_scene_says(shape):
    image = drawing.draw(Scene(shape, "red", "blue", "large", "middle"))
    assert pixel(image, 1, 1) == COLOURS["blue"]
    assert COLOURS["red"] in {pixel(image, 32, y) for y in range(64)}


@pytest.mark.parametrize(
    ("place", "inside"),
    [("left", (19, 32)), ("right", (45, 32)), ("top", (32, 19)), ("bottom", (32, 45))],
)
def test_places_are_where_they_are_called(place, inside):
    image = drawing.draw(Scene("circle", "green", "white", "small", place))
    assert pixel(image, *inside) == COLOURS["green"]
    assert pixel(image, 32, 32) == COLOURS["white"]


def test_sizes_differ_in_area():
    areas = []
    for size in scenes.SIZE_WORDS:
        drawn = drawing.render([Scene("circle", "white", "black", size)])
        areas.append(float((drawn > 0.5).float().mean()))
    assert areas == sorted(areas)
    assert areas[2] > 3 * areas[0]


def test_a_ring_has_a_hole():
    image = drawing.draw(Scene("ring", "red", "white", "large"))
    assert pixel(image, 32, 32) == COLOURS["white"]


def test_images_and_tensors_convert_both_ways():
    batch = drawing.render([Scene("star", "red", "blue"), Scene("square", "black", "white")])
    again = drawing.from_images(drawing.to_images(batch))
    assert torch.allclose(batch, again, atol=1 / 255)


def test_prompts_are_held_out_distinct_and_the_same_for_a_seed():
    prompts = scenes.prompts(200, 5)
    assert prompts == scenes.prompts(200, 5) != scenes.prompts(200, 6)
    assert len({prompt.text for prompt in prompts}) == 200
    assert all(scenes.is_held_out(prompt.scene) for prompt in prompts)


def test_no_training_scene_is_held_out_and_every_pair_is_seen():
    seen = scenes.training_scenes()
    assert not any(scenes.is_held_out(scene) for scene in seen)
    pairs = {(scene.shape, scene.colour) for scene in seen}
    assert len(pairs) == len(scenes.SHAPES) * len(COLOURS)


@pytest.mark.parametrize("category", ATTRIBUTES)
def test_an_edit_changes_its_category_alone(category):
    for edit in scenes.edits(category, 50, 3):
        changed = {a for a in ATTRIBUTES if getattr(edit.before, a) != getattr(edit.after, a)}
        assert changed == {category}
        assert edit.after.colour != edit.after.background


def test_captions_say_what_they_state():
    rng = random.Random(1)
    for scene in scenes.held_out_scenes()[:100]:
        prompt = scenes.caption(scene, rng)
        for word in (scene.shape, scene.colour, scene.background):
            assert word in prompt.text
