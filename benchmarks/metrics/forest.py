"""A forest plot as SVG: a row for each setting, with the interval of its difference from another."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.metrics.svg import BLUE, DARK, GRAY, document, line, text, ticks

WIDTH, ROW = 1000, 26
LEFT, RIGHT = 300, 720  # of the intervals; names are left of them, numbers right
TOP = 96  # of the first row


class Effect(NamedTuple):
    """A row: the setting, what it was compared with, and its numbers."""

    name: str
    base: str  # with which it was compared
    difference: tuple[float, float, float] | None  # mean and 95 % interval; None: nothing to compare
    cells: tuple[str, ...]  # one for each of the columns


def forest(effects: Sequence[Effect], *, title: str, x_title: str, columns: Sequence[str]) -> str:
    """The whole SVG: rows in their order, a thin line between rows of different bases."""
    low, high = limits(effects)
    bottom = TOP + ROW * len(effects)
    height = bottom + 70

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (RIGHT - LEFT)

    parts = [text(WIDTH / 2, 34, title, size=20)]
    parts.append(line((at(0), TOP - 18), (at(0), bottom), GRAY, 'stroke-dasharray="6 5"'))
    for number, name in enumerate(columns):
        parts.append(text(column_at(number), TOP - 26, name, size=13))
    last = effects[0].base if effects else ""
    for number, effect in enumerate(effects):
        y = TOP + ROW * number
        if effect.base != last:
            parts.append(line((20, y - ROW / 2), (WIDTH - 20, y - ROW / 2), "#dddddd"))
        last = effect.base
        parts += drawn(effect, y, at)
    parts.append(line((LEFT, bottom), (RIGHT, bottom), DARK))
    for value in ticks(low, high, 0.2):
        parts.append(line((at(value), bottom), (at(value), bottom + 6), DARK))
        parts.append(text(at(value), bottom + 24, f"{value:+.1f}" if abs(value) > 1e-9 else "0"))
    parts.append(text((LEFT + RIGHT) / 2, bottom + 52, x_title))
    return document(WIDTH, height, title, parts)


def drawn(effect: Effect, y: float, at: Callable[[float], float]) -> list[str]:
    """One row: its name, its numbers, and its interval, blue if that excludes 0; a base is a hollow point at 0."""
    parts = [text(LEFT - 16, y + 5, effect.name, "end", 14)]
    for column, cell in enumerate(effect.cells):
        parts.append(text(column_at(column), y + 5, cell, size=14))
    if effect.name == effect.base:
        parts.append(f'<circle cx="{at(0):.1f}" cy="{y}" r="5" fill="#ffffff" stroke="{DARK}" stroke-width="2"/>')
    elif effect.difference is not None:
        mean, least, most = effect.difference
        color = GRAY if least <= 0 <= most else BLUE
        parts.append(line((at(least), y), (at(most), y), color, width=3))
        parts.append(f'<circle cx="{at(mean):.1f}" cy="{y}" r="5" fill="{color}"/>')
    return parts


def limits(effects: Sequence[Effect]) -> tuple[float, float]:
    """The range of x that shows 0 and every interval."""
    low, high = -0.2, 0.2
    for effect in effects:
        if effect.difference is not None:
            low = min(low, effect.difference[1])
            high = max(high, effect.difference[2])
    return low - 0.04, high + 0.04


def column_at(number: int) -> float:
    """The middle of a column of numbers."""
    return RIGHT + 60 + 85 * number
