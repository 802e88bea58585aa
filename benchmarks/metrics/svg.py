"""What the drawings of results share: text, lines, round numbers on an axis, and the SVG around them."""

import math
from collections.abc import Sequence
from html import escape

FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
DARK, GRAY, BLUE = "#1b1b1b", "#999999", "#0072b2"


def text(x: float, y: float, content: str, anchor: str = "middle", size: int = 15, more: str = "") -> str:
    """One line of text."""
    style = f'font-family="{FONT}" font-size="{size}" text-anchor="{anchor}" fill="#1b1b1b" {more}'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content, quote=False)}</text>'


def line(
    start: tuple[float, float], end: tuple[float, float], color: str = "#999999", more: str = "", width: float = 1.5
) -> str:
    """A straight line."""
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width:g}" {more}/>'


def ticks(low: float, high: float, step: float) -> list[float]:
    """Round numbers from low to high."""
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [step * number for number in range(first, last + 1)]


def document(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A whole SVG: a title for screen readers, a white background, and the parts in their order."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(title, quote=False)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"
