"""A small drawing kit for the diagrams of the course: boxes, arrows and text as SVG, and a check of their geometry.

A drawing has a light background of its own, so that it reads on light and dark pages. Kinds of boxes differ in color
(Okabe and Ito's, which color-blind readers can tell apart) and in their outline, so that a gray print does as well.
"""

from dataclasses import dataclass, field
from html import escape

INK = "#1b1b1b"
PAPER = "#ffffff"
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "'DejaVu Sans Mono', Menlo, Consolas, monospace"
CHARACTER = {FONT: 0.59, MONO: 0.61}  # width of a character in font sizes; the widest of these fonts on average

# fill, outline, width of the outline, dashes, radius of the corners
KINDS = {
    "data": ("#ffffff", "#444444", 1.5, "", 12),
    "model": ("#d9ebf8", "#0072b2", 2, "", 2),
    "condition": ("#d8f0e6", "#007a5a", 2, "2 3", 2),
    "method": ("#fde3cf", "#c14f00", 3, "", 2),
    "reuse": ("#ffffff", "#c14f00", 3, "6 4", 2),
    "frame": ("#f6f6f6", "#777777", 1.5, "8 5", 6),
    "cell": ("#ffffff", "#aaaaaa", 1, "", 0),
}

Box = tuple[float, float, float, float]  # left, top, right, bottom
Point = tuple[float, float]


@dataclass
class Drawing:
    """An SVG under construction. title and description are its text alternative."""

    width: int
    height: int
    title: str
    description: str
    parts: list[str] = field(default_factory=list)
    texts: list[tuple[Box, str]] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)  # no text and no arrow may cross their outlines
    segments: list[tuple[Point, Point]] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, text: str = "", kind: str = "model", size: int = 15) -> None:
        """A box with its lines of text in the middle; lines that begin with ( are shapes."""
        fill, outline, width, dashes, radius = KINDS[kind]
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        style = f'fill="{fill}" stroke="{outline}" stroke-width="{width}"{dash}'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" {style}/>')
        if kind != "cell":
            self.boxes.append((x, y, x + w, y + h))
        lines = text.splitlines()
        top = y + h / 2 - (len(lines) - 1) * size * 0.65
        for number, line in enumerate(lines):
            self.text(x + w / 2, top + number * size * 1.3 + size * 0.35, line, size=size)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 15,
        anchor: str = "middle",
        color: str = INK,
        bold: bool = False,
    ) -> None:
        """One line whose baseline is at y; x is its middle, "start" or "end"."""
        font = MONO if text.startswith("(") else FONT
        if font == MONO:
            size -= 1
        weight = ' font-weight="bold"' if bold else ""
        style = f'font-family="{font}" font-size="{size}" text-anchor="{anchor}" fill="{INK}"{weight}'
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {style}>{escape(text, quote=False)}</text>')
        width = CHARACTER[font] * size * len(text) * (1.05 if bold else 1)
        left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
        self.texts.append(((left, y - 0.75 * size, left + width, y + 0.22 * size), text))

    def note(self, x: float, y: float, text: str) -> None:
        """One line of explanation that begins at x."""
        self.text(x, y, text, anchor="start")

    def arrow(self, *points: Point, kind: str = "data", head: bool = True) -> None:
        """A line through the points, with a head at the last."""
        _, outline, width, dashes, _ = KINDS[kind]
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        style = f'fill="none" stroke="{outline}" stroke-width="{max(width, 2)}"{dash}'
        self.parts.append(f'<polyline points="{path}" {style}/>')
        self.segments += zip(points[:-1], points[1:], strict=True)
        if head:
            self.head(points[-2], points[-1], outline)

    def head(self, start: Point, tip: Point, color: str) -> None:
        """The head of an arrow that comes from `start`."""
        along = complex(*tip) - complex(*start)
        along /= abs(along)
        corners = [complex(*tip), complex(*tip) - 11 * along + 5j * along, complex(*tip) - 11 * along - 5j * along]
        path = " ".join(f"{z.real:.1f},{z.imag:.1f}" for z in corners)
        self.parts.append(f'<polygon points="{path}" fill="{color}"/>')

    def plus(self, x: float, y: float) -> None:
        """The sign for a sum on a residual stream."""
        cross = f"M{x - 7:g} {y:g}h14M{x:g} {y - 7:g}v14"
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="12" fill="{PAPER}" stroke="#444444" stroke-width="2"/>')
        self.parts.append(f'<path d="{cross}" stroke="{INK}" stroke-width="2"/>')

    def svg(self) -> str:
        """The whole file."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        title = f"<title>{escape(self.title, quote=False)}</title>"
        description = f"<desc>{escape(self.description, quote=False)}</desc>"
        paper = f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{PAPER}"/>'
        return "\n".join([head, title, description, paper, *self.parts, "</svg>"]) + "\n"

    def problems(self) -> list[str]:
        """What a reader would trip over: text off the page, over an outline, over other text, or under an arrow."""
        page = (0, 0, self.width, self.height)
        faults = []
        for number, (area, text) in enumerate(self.texts):
            if not inside(area, page):
                faults.append(f"{text!r} is off the page")
            for box in self.boxes:
                if overlap(area, box) and not inside(area, box):
                    faults.append(f"{text!r} crosses the outline of {box}")
            for other, words in self.texts[:number]:
                if overlap(area, other):
                    faults.append(f"{text!r} lies on {words!r}")
            for start, end in self.segments:
                if crosses(start, end, area):
                    faults.append(f"{text!r} is crossed by the arrow from {start} to {end}")
        return faults


def inside(area: Box, box: Box) -> bool:
    """Whether an area lies in a box."""
    return area[0] >= box[0] and area[1] >= box[1] and area[2] <= box[2] and area[3] <= box[3]


def overlap(one: Box, other: Box) -> bool:
    """Whether two areas share more than an edge."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def crosses(start: Point, end: Point, area: Box) -> bool:
    """Whether a straight line enters an area, by 65 points on it."""
    for step in range(65):
        x = start[0] + (end[0] - start[0]) * step / 64
        y = start[1] + (end[1] - start[1]) * step / 64
        if area[0] < x < area[2] and area[1] < y < area[3]:
            return True
    return False
