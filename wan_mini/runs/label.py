"""A visible label on a video's frames, for those who want one: it is the only mark that a viewer sees."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wan_mini.errors import UserError

TEXT = "AI-generated"
NO_CHARACTER = "\uffff"  # which no font has
SHARE = 24  # of the height: rows of pixels to one of text


def add_label_flag(parser: Any) -> None:
    """Add --label to a parser, or to a group of one."""
    text = f"draw a text on the result's frames (none; without a value: {TEXT})"
    parser.add_argument("--label", nargs="?", const=TEXT, default="", metavar="TEXT", help=text)


def with_label(frames: np.ndarray, text: str) -> np.ndarray:
    """Frames (T,H,W,3) uint8 with a text in a black box at the lower left; "" changes nothing. Raises UserError."""
    if not text.strip():
        return frames
    height, width = frames.shape[1:3]
    box = label_box(text, height, width)
    labeled = frames.copy()
    labeled[:, height - box.height :, : box.width] = np.asarray(box)  # (h,w,3) over (T,h,w,3)
    return labeled


def _picture(font: Any, character: str) -> bytes:
    """How a font draws a character; all that it lacks look alike."""
    mask = font.getmask(character)
    return bytes(mask) + repr(mask.size).encode()


def label_box(text: str, height: int, width: int) -> Image.Image:
    """A text, white on black, as large as frames of this size have it. Raises UserError if it does not fit into them.

    A program draws it before it computes anything, so that no run ends with a label that does not fit.
    """
    text = " ".join(text.split())  # one line
    size = max(10, height // SHARE)
    font = ImageFont.load_default(size)
    missing = [character for character in text if _picture(font, character) == _picture(font, NO_CHARACTER)]
    if missing:
        raise UserError(f"--label has characters that its font lacks, got {''.join(missing)!r}: use others")
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    margin = size // 3
    box = Image.new("RGB", (right - left + 2 * margin, bottom - top + 2 * margin), "black")
    if box.width > width or box.height > height:
        needed = f"a text that fits into {width}x{height} pixels"
        got = f"{text!r}, which takes {box.width}x{box.height}"
        raise UserError(f"--label needs {needed}, got {got}: choose a shorter one")
    ImageDraw.Draw(box).text((margin - left, margin - top), text, fill="white", font=font)
    return box
