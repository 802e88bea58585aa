"""A strip plot as SVG: for each row every value as a tick, one kind above the other, and a limit as a dashed line."""

from collections.abc import Mapping, Sequence

from benchmarks.metrics.svg import BLUE, DARK, GRAY, document, line, text, ticks

WIDTH, ROW = 1000, 34
LEFT, RIGHT = 180, 960  # of the values; names are left of them
TOP = 80  # of the first row
COLORS = (BLUE, GRAY)  # of the first kind, above, and the second

Values = Sequence[float]


def strip(rows: Mapping[str, tuple[Values, Values]], *, title: str, x_title: str, limit: tuple[float, str]) -> str:
    """The whole SVG. rows: the values of both kinds by the row's name; limit: a value and what to write at it."""
    every = [value for kinds in rows.values() for values in kinds for value in values]
    low = min(0.0, *every)
    high = max(limit[0], *every)
    bottom = TOP + ROW * len(rows)

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (RIGHT - LEFT)

    parts = [text(WIDTH / 2, 30, title, size=20)]
    parts.append(line((at(limit[0]), TOP - 14), (at(limit[0]), bottom), DARK, 'stroke-dasharray="6 5"'))
    parts.append(text(at(limit[0]) + 6, TOP - 16, limit[1], "start", 13))
    for number, (name, kinds) in enumerate(rows.items()):
        middle = TOP + ROW * (number + 0.5)
        parts.append(text(LEFT - 16, middle + 5, name, "end", 14))
        for values, color, y in zip(kinds, COLORS, (middle - 7, middle + 7), strict=True):
            for value in values:
                parts.append(line((at(value), y - 6), (at(value), y + 6), color, width=1.5))
    parts.append(line((LEFT, bottom), (RIGHT, bottom), DARK))
    for value in ticks(low, high, 20):
        parts.append(line((at(value), bottom), (at(value), bottom + 6), DARK))
        parts.append(text(at(value), bottom + 24, f"{value:g}"))
    parts.append(text((LEFT + RIGHT) / 2, bottom + 52, x_title))
    return document(WIDTH, bottom + 70, title, parts)
