"""Pictures in: a folder of PNG or JPEG, an animation of any kind that Pillow decodes by itself.

Whoever sends a clip chooses its bytes. So only the decoders named here run, whatever a file is called (Pillow would
start Ghostscript for PostScript); only regular files are opened (a pipe never ends); and files, pictures and
animations have a largest size, which is checked before a picture is decoded.
"""

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from wan_mini.errors import MissingFile, UserError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg")  # of a folder's frames
IMAGE_FORMATS = ("PNG", "JPEG")  # Pillow's names of the decoders that may run
ANIMATION_FORMATS = ("GIF", "WEBP", "PNG", "JPEG")
MAX_BYTES = 2**29  # of one file
MAX_PIXELS = 2**25  # of one picture: 8K
MAX_FRAMES = 10_000  # of one animation


def check_regular(path: Path) -> None:
    """Raises UserError unless the path leads to a regular file: pipes, sockets and devices may never end."""
    if not path.is_file():
        raise UserError(f"{path} is no regular file (a folder, pipe, socket or device?): copy the clip into a file")


def check_pixels(path: Path, size: tuple[int, int]) -> None:
    """Raises UserError if a picture of this (width, height) is larger than any that is read."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise UserError(f"{path} has {width}x{height} pixels, more than {MAX_PIXELS}: make it smaller")


def read_folder(folder: Path) -> Iterator[Image.Image]:
    """The pictures of a folder in natural order, RGB. Raises UserError as read_video."""
    paths = []
    for path in folder.iterdir():
        if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith("."):
            paths.append(path)
    if not paths:
        raise MissingFile(f"no {' '.join(IMAGE_EXTENSIONS)} in {folder}: extract the clip's frames into it")
    paths.sort(key=_natural_order)
    first_size = None
    for path in paths:
        with open_image(path, IMAGE_FORMATS) as file:
            image = to_rgb(file)
        if first_size is None:
            first_size = image.size
        if image.size != first_size:
            sizes = f"{paths[0].name} has (width, height) = {first_size}, {path.name} has {image.size}"
            raise UserError(f"frames in {folder} must have one size, but {sizes}: resize or remove one")
        yield image


def _natural_order(path: Path) -> tuple[list[str | int], str]:
    """Sort key that reads numbers as numbers: "frame10" -> ["frame", 10, ""] comes behind "frame2"."""
    parts: list[str | int] = []
    for part in re.split(r"(\d+)", path.stem.lower()):
        parts.append(int(part) if part.isdecimal() else part)
    return parts, path.name


def nearest_frames(durations: Sequence[float], fps: float, limit: int = MAX_FRAMES) -> np.ndarray:
    """Resample in time: the index of the source frame to show for each output frame, at `fps` frames per second.

    durations: milliseconds that each source frame stays on screen. Output frame k shows what is on screen at the
    center of its interval, (k + 1/2) / fps; a tie goes to the earlier frame. ffmpeg's fps filter does the same.
    limit: the most output frames, however long the source stays on screen.
    """
    ends = np.cumsum(durations)
    count = min(limit, round(ends[-1] * fps / 1000))
    centers = (np.arange(count) + 0.5) * 1000 / fps
    return np.searchsorted(ends, centers - 1e-6)  # rounding in the sums must not break a tie


def read_animation(path: Path, fps: float | None, frames: int | None) -> Iterator[Image.Image]:
    """The first `frames` pictures of an animation, RGB, resampled to `fps`. Raises UserError as read_video."""
    limit = MAX_FRAMES
    needed = math.inf
    if frames is not None:
        limit = frames
        if fps:
            needed = frames * 1000 / fps
    with open_image(path, ANIMATION_FORMATS) as file:
        first = int(getattr(file, "default_image", False))  # an APNG's cover is not part of the animation
        durations = _frame_durations(path, file, first, needed)
    # Encoders merge equal neighbors into one longer frame: counting in units of the shortest finds them again.
    units = np.rint(np.divide(durations, min(durations))).sum()
    rate = fps or units * 1000 / sum(durations)
    count = sum(durations) * rate / 1000
    if frames is None and count > MAX_FRAMES:
        raise UserError(f"{path} makes {count:.0f} frames, more than {MAX_FRAMES}: cut it, or read a part")
    indices = [0]
    if len(durations) > 1:
        indices = nearest_frames(durations, rate, limit).tolist()
    with open_image(path, ANIMATION_FORMATS) as file:
        for index in indices:
            file.seek(first + index)
            check_pixels(path, file.size)
            yield to_rgb(file)


def _frame_durations(path: Path, file: Image.Image, first: int, needed: float) -> list[float]:
    """Milliseconds of each frame from number `first` on, until they sum up to those needed."""
    durations: list[float] = []
    total = 0.0
    counted = file.format != "GIF"  # a GIF does not say how many frames it has
    last = getattr(file, "n_frames", 1) if counted else first + MAX_FRAMES + 1
    for index in range(first, last):
        try:
            file.seek(index)
        except EOFError:
            if counted:
                raise
            break
        check_pixels(path, file.size)
        file.load()  # only now does a WebP frame know its duration
        duration = file.info.get("duration", 0)
        durations.append(duration if duration > 10 else 100)
        total += durations[-1]
        if total > needed and len(durations) > 1:  # one picture alone would be a still
            break
        if len(durations) > MAX_FRAMES:
            raise UserError(f"{path} has more than {MAX_FRAMES} frames: cut it")
    return durations


@contextmanager
def open_image(path: Path, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Open a picture or animation for these decoders only; what they raise on broken bytes becomes a UserError."""
    check_regular(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path} has {size} bytes, more than {MAX_BYTES}: make it shorter or smaller")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_pixels is stricter
            warnings.simplefilter("ignore", UserWarning)  # of broken EXIF data and animation chunks
            with Image.open(path, formats=formats) as file:
                check_pixels(path, file.size)
                yield file
    except (UserError, MemoryError):
        raise
    except Exception as error:  # on broken bytes Pillow's decoders raise OSError, SyntaxError, IndexError and more
        raise UserError(f"cannot read {path}, it is damaged or no image ({error}): export it again") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture upright, with its transparency over white, in 8-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":  # 16-bit gray, which Pillow would clip at 255
        image = image.point(lambda value: value * (1 / 257))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
    return image.convert("RGB")
