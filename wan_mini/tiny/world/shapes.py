"""What a scene is made of: shapes, colors and backgrounds.

A point of the plane is one complex number, z = column + i row, in pixels. Pixel (r, c) has its center at c + ir.

      0 --- 1 --- 2 --> column, real part         z + 2          two pixels to the right
      |     |                                     z - 3i         three pixels up
      i -- 1+i                                    s z            s times as far from 0
      v                                           exp(ia) z      rotated about 0 by a radians, clockwise as seen
      row, imaginary part

So a rotation with a scale is one multiplication and a shift is one addition.

A shape is given by its signed distance function: how far a point lies outside of the outline, negative inside. It
takes points in units of the sprite's size, with the center of mass at 0, and the first tip upwards, towards -i.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from wan_mini.tiny.world.constants import REACH

Distance = Callable[[np.ndarray], np.ndarray]  # points z -> signed distances, both in the sprite's size
Texture = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # column, row, noise -> share of the light color
RGB = tuple[int, int, int]  # 0 to 255


class Shape(NamedTuple):
    """A shape that sprites can have."""

    distance: Distance
    tips: int  # as many points are tracked around the center, one towards each tip
    nouns: tuple[str, ...]  # for captions


class Background(NamedTuple):
    """A texture between two colors."""

    dark: RGB
    light: RGB
    texture: Texture
    nouns: tuple[str, ...]  # for captions


def disc(z: np.ndarray) -> np.ndarray:
    """A filled circle."""
    return np.abs(z) - 0.95


def ring(z: np.ndarray) -> np.ndarray:
    """A circle with a round hole."""
    return np.abs(np.abs(z) - 0.72) - 0.28


def box(z: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """A rectangle; outside of its corners this is less than the true distance."""
    return np.maximum(np.abs(z.real) - half_width, np.abs(z.imag) - half_height)


def square(z: np.ndarray) -> np.ndarray:
    """A square."""
    return box(z, 0.86, 0.86)


def cross(z: np.ndarray) -> np.ndarray:
    """Two bars across each other: inside of either."""
    return np.minimum(box(z, 1, 0.36), box(z, 0.36, 1))


def bar(z: np.ndarray) -> np.ndarray:
    """An upright bar with round ends: the points near a line from -i REACH to i REACH."""
    beyond_the_line = np.maximum(np.abs(z.imag) - REACH, 0)
    return np.abs(z.real + 1j * beyond_the_line) - 0.35


def pointed(z: np.ndarray, tips: int, outer: float, inner: float) -> np.ndarray:
    """A star with tips at radius `outer` and notches at `inner`, or a polygon, whose notches lie on its sides.

    All edges are mirror images of one another. Each point is folded into the sector between a tip, at angle 0, and the
    next notch, at angle pi / tips; there is one edge in it, the straight line from tip to notch.
    """
    half = np.pi / tips
    from_tip = np.angle(1j * z)  # 0 upwards
    folded = np.abs((from_tip + half) % (2 * half) - half)
    point = np.abs(z) * np.exp(1j * folded)
    edge = inner * np.exp(1j * half) - outer
    along = edge / abs(edge)
    return ((outer - point) * np.conj(along)).imag  # the part of (outer - point) across the edge


def triangle(z: np.ndarray) -> np.ndarray:
    """An equilateral triangle."""
    return pointed(z, 3, 1.3, 0.65)


def star(z: np.ndarray) -> np.ndarray:
    """A star with five tips."""
    return pointed(z, 5, 1.25, 0.56)


SHAPES = {
    "disc": Shape(disc, 4, ("disc", "circle")),
    "square": Shape(square, 4, ("square",)),
    "triangle": Shape(triangle, 3, ("triangle",)),
    "star": Shape(star, 5, ("star",)),
    "ring": Shape(ring, 4, ("ring", "hoop")),
    "cross": Shape(cross, 4, ("cross", "plus sign")),
}
BAR = Shape(bar, 2, ())
LIMBS = {"arm": "a {} arm", "legs": "two {} legs"}  # each arm and each leg is two bars
COLORS = {
    "red": (226, 38, 44),
    "yellow": (250, 212, 38),
    "green": (32, 188, 74),
    "blue": (38, 98, 240),
    "purple": (150, 56, 222),
    "pink": (255, 80, 170),
}
HELD_OUT = frozenset(zip(SHAPES, COLORS))  # pairs that are never trained on; each shape and each color alone is


# Textures: column and row in pixels, from a random origin, and smooth noise in about [-1, 1].


def sand(column: np.ndarray, row: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Ripples that run across."""
    return 0.5 + 0.5 * np.sin(row / 3 + 3 * noise)


def grass(column: np.ndarray, row: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Upright blades in short rows."""
    return 0.5 + 0.5 * np.sin(column / 3 + 2 * noise) * np.sin(row / 5 - 3 * noise)


def wood(column: np.ndarray, row: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Planks with dark gaps, and a grain along them."""
    planks = np.clip(4 * np.abs(np.sin(row / 10)), 0, 1)
    grain = 0.7 + 0.3 * np.sin(row / 2 + column / 40 + 4 * noise)
    return planks * grain


def water(column: np.ndarray, row: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """A net of bright lines, where two waves cancel."""
    waves = np.sin(column / 13 + 2 * noise) + np.sin(row / 8 - 2 * noise)
    return (1 - 0.5 * np.abs(waves)) ** 2


def tiles(column: np.ndarray, row: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """A checkerboard with soft edges."""
    checks = np.clip(6 * np.sin(column / 8) * np.sin(row / 8), -1, 1)
    return 0.5 + 0.35 * checks + 0.15 * noise


def night_sky(column: np.ndarray, row: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Dim stars on a grid that the noise bends."""
    stars = 9 * np.sin(column / 9 + noise / 3) * np.sin(row / 8 - noise / 3) - 8
    return np.clip(stars, 0.1 + noise / 10, 0.7)


BACKGROUNDS = {
    "sand": Background((196, 172, 134), (226, 208, 174), sand, ("sand", "a sandy beach")),
    "grass": Background((58, 80, 44), (92, 114, 62), grass, ("grass", "a lawn")),
    "wood": Background((86, 60, 42), (146, 108, 80), wood, ("wooden planks", "a wooden floor")),
    "water": Background((36, 86, 96), (84, 138, 144), water, ("water", "a lake")),
    "tiles": Background((118, 120, 124), (186, 188, 192), tiles, ("grey tiles", "a tiled floor")),
    "night sky": Background((20, 18, 34), (214, 212, 226), night_sky, ("the night sky", "a starry sky")),
}
