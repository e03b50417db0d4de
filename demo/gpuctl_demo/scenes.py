"""What a drawing shows, and how plain English says so.

A scene is one shape on a flat background. Captions and edit instructions are built from small
grammars; everything here is a pure function of its arguments, a seed included.
"""

import itertools
import random
from collections.abc import Iterator

import attrs

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (215, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 85, 215),
    "yellow": (245, 215, 50),
    "orange": (240, 130, 30),
    "purple": (135, 55, 170),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
SIZES = ("small", "medium", "large")
PLACES = ("middle", "left", "right", "top", "bottom")

VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "size": SIZES,
    "place": PLACES,
}
"""Every attribute of a scene with all its values. An edit's category is one of the keys."""

ATTRIBUTES = tuple(VALUES)
MAIN_ATTRIBUTES = ("shape", "colour", "background")
"""What every caption says; size and place are said by some."""

LONGEST_TEXT = 24
"""Upper bound of a caption or instruction in tokens, start and end included."""

SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium sized"),
    "large": ("large", "big", "huge"),
}
PLACE_WORDS = {
    "middle": ("in the middle", "in the centre", "at the center"),
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "near the top edge"),
    "bottom": ("at the bottom", "near the bottom edge"),
}
CAPTIONS = (
    "a {thing}{where} on a {background} background",
    "{thing}{where}, {background} background",
    "a picture of a {thing}{where} on {background}",
    "a drawing of a {thing}{where} in front of a {background} background",
    "on a {background} background there is a {thing}{where}",
    "one {thing}{where}, everything behind it is {background}",
)
COLOUR_ORDERS = (
    "make it {value}",
    "make the {shape} {value}",
    "turn the {shape} {value}",
    "paint the {shape} {value}",
    "change the colour to {value}",
    "change the color of the {shape} to {value}",
)
SHAPE_ORDERS = (
    "make it a {value}",
    "turn it into a {value}",
    "turn the {shape} into a {value}",
    "replace the {shape} with a {value}",
    "change the shape to a {value}",
    "change the {shape} to a {value}",
)
BACKGROUND_ORDERS = (
    "make the background {value}",
    "change the background to {value}",
    "put the {shape} on a {value} background",
    "put it on a {value} background",
    "turn the background {value}",
    "paint everything behind the {shape} {value}",
)
SIZE_ORDERS = {
    "small": ("make it small", "make the {shape} tiny", "shrink the {shape} to a small size"),
    "medium": (
        "make it medium sized",
        "make the {shape} medium",
        "resize the {shape} to a medium size",
    ),
    "large": ("make it large", "make the {shape} big", "grow the {shape} to a large size"),
}
PLACE_ORDERS = {
    "middle": ("move it to the middle", "move the {shape} to the centre", "center the {shape}"),
    "left": ("move it to the left", "move the {shape} to the left side"),
    "right": ("move it to the right", "move the {shape} to the right side"),
    "top": ("move it to the top", "move the {shape} up to the top edge"),
    "bottom": ("move it to the bottom", "move the {shape} down to the bottom edge"),
}


@attrs.frozen
class Scene:
    """One shape of some colour, size and place on a flat background, all named in words."""

    shape: str
    colour: str
    background: str
    size: str = "medium"
    place: str = "middle"


@attrs.frozen
class Prompt:
    """A caption, the scene it was made from, and the attributes that it states."""

    text: str
    scene: Scene
    states: tuple[str, ...]


@attrs.frozen
class Edit:
    """One instruction that turns `before` into `after`; only attribute `category` differs."""

    before: Scene
    instruction: str
    after: Scene
    category: str


def is_held_out(scene: Scene) -> bool:
    """True for the tenth of all (shape, colour, background) triples that training never sees.

    A linear rule spreads them: every shape, colour and pair of the two is seen in training.
    """
    colours = VALUES["colour"]
    shape, colour = SHAPES.index(scene.shape), colours.index(scene.colour)
    return (3 * shape + colour + 4 * colours.index(scene.background)) % 10 == 0


def all_scenes() -> Iterator[Scene]:
    """Every scene whose shape can be seen against its background, in a fixed order."""
    scenes = itertools.starmap(Scene, itertools.product(*VALUES.values()))
    return (scene for scene in scenes if scene.colour != scene.background)


def training_scenes() -> list[Scene]:
    """The scenes that models may learn from."""
    return [scene for scene in all_scenes() if not is_held_out(scene)]


def held_out_scenes() -> list[Scene]:
    """The scenes kept for measuring."""
    return [scene for scene in all_scenes() if is_held_out(scene)]


def caption(scene: Scene, rng: random.Random) -> Prompt:
    """One of many ways to describe the scene; size and place are each left out now and then."""
    sized, placed = rng.random() < 0.7, rng.random() < 0.7
    size = rng.choice(SIZE_WORDS[scene.size]) + " " if sized else ""
    where = " " + rng.choice(PLACE_WORDS[scene.place]) if placed else ""
    thing = f"{size}{scene.colour} {scene.shape}"
    text = rng.choice(CAPTIONS).format(thing=thing, where=where, background=scene.background)
    said = ("size",) * sized + ("place",) * placed
    return Prompt(_with_article(text), scene, MAIN_ATTRIBUTES + said)


def instruction(before: Scene, category: str, value: str, rng: random.Random) -> str:
    """One of several ways to ask for `value` as the scene's new `category`."""
    templates = {
        "shape": SHAPE_ORDERS,
        "colour": COLOUR_ORDERS,
        "background": BACKGROUND_ORDERS,
        "size": SIZE_ORDERS.get(value, ()),
        "place": PLACE_ORDERS.get(value, ()),
    }[category]
    return _with_article(rng.choice(templates).format(shape=before.shape, value=value))


def edited(before: Scene, category: str, value: str) -> Scene:
    """The scene with one attribute replaced."""
    return attrs.evolve(before, **{category: value})


def possible_values(before: Scene, category: str) -> list[str]:
    """The values that an edit of this category can ask for: new, and leaving the shape visible."""
    hidden = {"colour": before.background, "background": before.colour}.get(category)
    now = getattr(before, category)
    return [value for value in VALUES[category] if value not in {now, hidden}]


def prompts(n: int, seed: int) -> list[Prompt]:
    """`n` different held-out prompts, always the same for a seed."""
    rng = random.Random(seed)
    scenes, found = held_out_scenes(), dict[str, Prompt]()
    while len(found) < n:
        prompt = caption(rng.choice(scenes), rng)
        found.setdefault(prompt.text, prompt)
    return list(found.values())


def edits(category: str, n: int, seed: int) -> list[Edit]:
    """`n` different held-out edits of one category, always the same for a seed.

    The scene after the edit is a held-out one, so no model has seen such an edit.
    """
    rng = random.Random(f"{category} {seed}")
    scenes, found = held_out_scenes(), dict[Edit, None]()
    while len(found) < n:
        found.setdefault(_edit_towards(rng.choice(scenes), category, rng))
    return list(found)


def _edit_towards(after: Scene, category: str, rng: random.Random) -> Edit:
    before = edited(after, category, rng.choice(possible_values(after, category)))
    text = instruction(before, category, getattr(after, category), rng)
    return Edit(before, text, after, category)


def _with_article(text: str) -> str:
    return text.replace("a orange", "an orange")
