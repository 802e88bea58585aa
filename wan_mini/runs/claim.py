"""What a generated clip says of itself: the settings in its own metadata, or in the run.json beside it.

Anybody may have written them, so they are read as untrusted: bounded, checked, and never believed for a large video.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from wan_mini import ffmpeg
from wan_mini.config import MAX_SIDE, MAX_TOKENS, TIME_STRIDE, valid_size
from wan_mini.errors import UserError
from wan_mini.images import ANIMATION_FORMATS, open_image
from wan_mini.json_file import MAX_BYTES, parse_json
from wan_mini.noise import SEEDS
from wan_mini.video import EXIF_IMAGE_DESCRIPTION, VIDEO_EXTENSIONS

SIZES = ("frames", "height", "width")
CLAIMS = ("seed", "key", *SIZES)  # what a clip's metadata may say of its original
TIMES = (16, 4)  # how many times its own frames, and its own pixels, a clip may say that its original had


def read_claim(clip: Path) -> dict[str, Any]:
    """What a clip says about itself, in its own metadata or in the run.json beside it; {} where it is silent."""
    texts: list[bytes | str] = []
    if clip.is_file():
        texts.append(read_metadata(clip))
    record = clip.parent / "run.json"
    if record.is_file() and record.stat().st_size <= MAX_BYTES:
        texts.append(record.read_bytes())
    for text in texts:
        claim = {}
        with suppress(ValueError, TypeError):
            label = parse_json(text, str(clip))
            claim = {**label, **label.get("config", {}), **label.get("clip", {})}
        known = {name: claim[name] for name in CLAIMS if name in claim and _is_sound(name, claim[name])}
        if "seed" in known:
            return known
    return {}


def read_metadata(clip: Path) -> str:
    """The settings that a run has written into a video: a WebP's EXIF data, an mp4's comment; "" without any."""
    if clip.suffix.lower() in VIDEO_EXTENSIONS:
        return ffmpeg.read_comment(clip) if ffmpeg.is_installed() else ""
    with suppress(UserError), open_image(clip, ANIMATION_FORMATS) as file:
        return str(file.getexif().get(EXIF_IMAGE_DESCRIPTION, ""))
    return ""


def _is_sound(name: str, value: object) -> bool:
    """Whether a claim, which anybody may have written, has a type and size to work with."""
    if name == "key":
        return isinstance(value, str)
    low, high = SEEDS if name == "seed" else (1, MAX_TOKENS)
    return type(value) is int and low <= value <= high


def believable_size(claim: Mapping[str, Any], shape: Sequence[int]) -> dict[str, int]:
    """The original's frames, height and width if a claim of them may be true of a clip (T,H,W,3); {} else.

    A few bytes of metadata must not ask for much memory: the original has at most TIMES as much as the clip itself.
    """
    if not all(name in claim for name in SIZES):
        return {}
    frames, height, width = (claim[name] for name in SIZES)
    whole = frames % TIME_STRIDE == 1 and valid_size((height, width)) == (height, width)
    small = frames <= TIMES[0] * shape[0] and height * width <= TIMES[1] * shape[1] * shape[2]
    if not whole or not small or max(height, width) > MAX_SIDE:
        return {}
    return {name: claim[name] for name in SIZES}
