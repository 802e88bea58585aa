"""What a generated clip says of itself: the settings in its own metadata, or in the run.json beside it.

Anybody may have written them, so they are read as untrusted: bounded, checked, and never believed for a large video.
"""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from wan_mini import ffmpeg
from wan_mini.errors import UserError
from wan_mini.images import ANIMATION_FORMATS, open_image
from wan_mini.json_file import MAX_BYTES, parse_json
from wan_mini.video import EXIF_IMAGE_DESCRIPTION

SIZES = ("frames", "height", "width")
CLAIMS = ("seed", "key", *SIZES)  # what a clip's metadata may say of its original
SEED_RANGE = (-(2**63), 2**64)  # as --seed takes them
LARGEST = 2**28  # frames x height x width that a claim may name: 81 frames of 1820x1820. --frames etc. may name more


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
        if math.prod(known.get(name, 1) for name in SIZES) > LARGEST:
            known = {name: value for name, value in known.items() if name not in SIZES}
        if "seed" in known:
            return known
    return {}


def read_metadata(clip: Path) -> str:
    """The settings that a run has written into a video: a WebP's EXIF data, an mp4's comment; "" without any."""
    if clip.suffix == ".mp4":
        return ffmpeg.read_comment(clip) if ffmpeg.is_installed() else ""
    with suppress(UserError), open_image(clip, ANIMATION_FORMATS) as file:
        return str(file.getexif().get(EXIF_IMAGE_DESCRIPTION, ""))
    return ""


def _is_sound(name: str, value: object) -> bool:
    """Whether a claim, which anybody may have written, has a type and size to work with."""
    if name == "key":
        return isinstance(value, str)
    low, high = SEED_RANGE if name == "seed" else (1, LARGEST + 1)
    return type(value) is int and low <= value < high
