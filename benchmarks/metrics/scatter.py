"""A scatter plot as SVG: numbered points with intervals, their frontier, two limits, and a list of names."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.metrics.svg import document, line, text, ticks

WIDTH, HEIGHT = 1120, 640
LEFT, RIGHT, TOP, BOTTOM = 80, 760, 60, 560  # of the plot itself; the names are right of it
# Where a point's number may begin, from the point: right and down, in pixels; the first that is free is taken.
SIDES = [(9, -7), (9, 15), (-25, -7), (-25, 15), (14, 4), (-30, 4), (14, -22), (14, 28), (-30, -22), (-30, 28)]


class Mark(NamedTuple):
    """A point: where it is, half of its interval, and its color."""

    name: str
    x: float
    y: float
    half: float
    color: str


class Axes(NamedTuple):
    """The ranges that are shown."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Position in the drawing."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)


def frontier(marks: Sequence[Mark]) -> list[Mark]:
    """The points than which no cheaper one is better, from the cheapest on."""
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.x, -mark.y)):
        if not best or mark.y > best[-1].y:
            best.append(mark)
    return best


def frame(axes: Axes, x_title: str, y_title: str) -> list[str]:
    """The axes with their numbers and titles."""
    parts = [line((LEFT, BOTTOM), (RIGHT, BOTTOM), "#1b1b1b"), line((LEFT, TOP), (LEFT, BOTTOM), "#1b1b1b")]
    for value in ticks(*axes.x, 0.25):
        x, _ = axes.at(value, axes.y[0])
        parts += [line((x, BOTTOM), (x, BOTTOM + 6), "#1b1b1b"), text(x, BOTTOM + 24, f"{value:g}")]
    for value in ticks(*axes.y, 0.2):
        _, y = axes.at(axes.x[0], value)
        parts += [line((LEFT - 6, y), (LEFT, y), "#1b1b1b"), text(LEFT - 10, y + 5, f"{value:.1f}", "end")]
    middle = (TOP + BOTTOM) / 2
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 56, x_title))
    parts.append(text(28, middle, y_title, more=f'transform="rotate(-90 28 {middle:.1f})"'))
    return parts


def scatter(
    marks: Sequence[Mark],
    *,
    title: str,
    x_title: str,
    y_title: str,
    limit: tuple[float, str],
    ceiling: tuple[float, str],
) -> str:
    """The whole SVG; limit: a least x and its name, ceiling: a largest y and its name."""
    xs = [limit[0], 1.0]
    ys = [ceiling[0], 0.0]
    for mark in marks:
        xs.append(mark.x)
        ys += [mark.y - mark.half, mark.y + mark.half]
    axes = Axes((0.0, 1.08 * max(xs)), (min(ys) - 0.05, max(ys) + 0.08))
    parts = frame(axes, x_title, y_title)
    dashes = 'stroke-dasharray="6 5"'
    x, y = axes.at(limit[0], ceiling[0])
    parts += [line((x, TOP), (x, BOTTOM), more=dashes), text(x + 6, BOTTOM - 8, limit[1], "start", 13)]
    parts += [line((LEFT, y), (RIGHT, y), more=dashes), text(RIGHT, y - 6, ceiling[1], "end", 13)]
    corners = []
    for mark in frontier(marks):
        corners.append("{:.1f},{:.1f}".format(*axes.at(mark.x, mark.y)))
    parts.append(f'<polyline points="{" ".join(corners)}" fill="none" stroke="#bbbbbb" stroke-width="3"/>')
    labels = label_positions([axes.at(mark.x, mark.y) for mark in marks])
    for number, (mark, label) in enumerate(zip(marks, labels, strict=True), start=1):
        parts += drawn(axes, number, mark, label)
    return document(WIDTH, HEIGHT, title, [text((LEFT + RIGHT) / 2, 32, title, size=20), *parts])


def label_positions(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where the number of each point begins: at the first of SIDES where it covers no point and no other number."""
    labels: list[tuple[float, float]] = []
    for x, y in points:
        free = []
        for across, down in SIDES:
            label = (x + across, y + down)
            middle = (label[0] + 8, label[1] - 4)  # of two digits
            near_label = any(abs(label[0] - other[0]) < 18 and abs(label[1] - other[1]) < 12 for other in labels)
            near_point = any(abs(middle[0] - other[0]) < 14 and abs(middle[1] - other[1]) < 10 for other in points)
            if not near_label and not near_point:
                free.append(label)
        labels.append(free[0] if free else (x + SIDES[0][0], y + SIDES[0][1]))
    return labels


def drawn(axes: Axes, number: int, mark: Mark, label: tuple[float, float]) -> list[str]:
    """A point with its interval and number, and its line in the list of names."""
    x, y = axes.at(mark.x, mark.y)
    _, low = axes.at(mark.x, mark.y - mark.half)
    _, high = axes.at(mark.x, mark.y + mark.half)
    row = TOP + 18 * (number - 1)
    named = mark.color != "#555555"
    weight = 'font-weight="bold"' if named else ""
    radius = 8 if named else 5
    return [
        line((x, low), (x, high), mark.color, 'opacity="0.5"'),
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{mark.color}"/>',
        text(*label, str(number), "start", 12, weight),
        f'<circle cx="{RIGHT + 40}" cy="{row - 4}" r="{radius}" fill="{mark.color}"/>',
        text(RIGHT + 54, row, f"{number}  {mark.name}", "start", 14, weight),
    ]
