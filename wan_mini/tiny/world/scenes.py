"""What a clip shows: objects on a background, drawn at random, and a caption that says all of it but the motion."""

from collections.abc import Iterable
from dataclasses import dataclass

from numpy.random import Generator

from wan_mini.tiny.world.shapes import BACKGROUNDS, COLORS, HELD_OUT, LIMBS, SHAPES

Objects = tuple[tuple[str, str], ...]  # (shape, color) each; an articulated one is its body and then its limb


@dataclass(frozen=True)
class Scene:
    """What there is to see."""

    caption: str
    objects: Objects
    background: str


def draw_scene(rng: Generator, count: int, limb: str | None, split: str, unlike: Scene | None = None) -> Scene:
    """A scene of `count` bodies, the last with the limb if one is named, all of different shapes and colors.

    Nothing in it is used in `unlike`. In the split "train", no pair of it is in HELD_OUT.
    """
    used: set[str] = set()
    if unlike:
        used = {unlike.background}.union(*unlike.objects)
    shapes = _others(SHAPES, used)
    colors = _others(COLORS, used)
    backgrounds = _others(BACKGROUNDS, used)
    while True:
        names = rng.permutation(shapes)[:count].tolist()
        if limb:
            names.append(limb)
        objects = tuple(zip(names, rng.permutation(colors).tolist()))
        if split == "held-out" or HELD_OUT.isdisjoint(objects):
            background = str(rng.choice(backgrounds))
            return Scene(_describe(rng, objects, background), objects, background)


def _others(names: Iterable[str], used: set[str]) -> list[str]:
    return [name for name in names if name not in used]


def _describe(rng: Generator, objects: Objects, background: str) -> str:
    """A caption: which shapes in which colors before which background."""
    place = rng.choice(BACKGROUNDS[background].nouns)
    bodies = []
    limbs = ""
    for shape, color in objects:
        if shape in LIMBS:
            limbs += " with " + LIMBS[shape].format(color)
        else:
            bodies.append(f"a {color} {rng.choice(SHAPES[shape].nouns)}")
    things = " and ".join(bodies[-2:]) + limbs
    if len(bodies) > 2:
        things = ", ".join(bodies[:-2]) + ", " + things
    on = rng.choice(["on", "over", "against", "in front of"])
    if bodies:
        sentences = [f"{things} {on} {place}", f"a picture of {things} {on} {place}", f"{on} {place}, {things}"]
    else:
        sentences = [place, f"a picture of {place}", f"nothing but {place}"]
    sentence = rng.choice(sentences)
    return f"{sentence[0].upper()}{sentence[1:]}."
