"""Clips in and out: image folders and animations by Pillow; mp4, mov and webm through ffmpeg (ffmpeg.py).

A clip is a (T, H, W, 3) uint8 RGB array; the model's video is a (1, 3, T, H, W) float32 tensor in [-1, 1].
Frames are decoded one by one and only those of the clip are kept: a long video costs no more memory than its clip.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from wan_mini import ffmpeg
from wan_mini.config import TOKEN_SIZE, valid_frames, valid_size
from wan_mini.errors import MissingFile, UserError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg")  # of a folder's frames
ANIMATION_EXTENSIONS = (".gif", ".webp", ".apng")  # an IMAGE_EXTENSIONS file may hold an animation, too
VIDEO_EXTENSIONS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi")  # these need ffmpeg
MIN_FRAMES = 5  # two latent frames, the least that can show motion
EXIF_IMAGE_DESCRIPTION = 0x010E  # the EXIF tag that keeps a WebP's metadata


def nearest_frames(durations: Sequence[float], fps: float) -> np.ndarray:
    """Resample in time: the index of the source frame to show for each output frame, at `fps` frames per second.

    durations: milliseconds that each source frame stays on screen. Output frame k shows what is on screen at the
    center of its interval, (k + 1/2) / fps; a tie goes to the earlier frame. ffmpeg's fps filter does the same.
    """
    ends = np.cumsum(durations)
    count = round(ends[-1] * fps / 1000)
    centers = (np.arange(count) + 0.5) * 1000 / fps
    return np.searchsorted(ends, centers - 1e-6)  # rounding in the sums must not break a tie


def read_video(
    path: str | Path, *, size: tuple[int, int] | None = None, frames: int | None = None, fps: float | None = None
) -> np.ndarray:
    """Read a clip: a folder of PNG/JPEG in natural order, a GIF/WebP/APNG, or through ffmpeg an mp4/mov/webm.

    size: (height, width) in pixels, multiples of 16; the aspect is kept and the excess cropped evenly from both sides.
      None keeps the clip's own, cropped to multiples of 16.
    frames: how many to read, 4k+1. None reads all; a shorter clip gives the largest 4k+1 that it has.
    fps: target frame rate, see `nearest_frames`. None keeps the clip's own. A folder has none: each image is a frame.
    Rotation tags are obeyed, transparency lies over white, durations up to 10 ms count as 100 ms (as in browsers).
    Returns (T, H, W, 3) uint8. Raises UserError; MissingFile if there is no clip, no image or no ffmpeg.
    """
    path = Path(path)
    _check_request(size, frames, fps)
    images = islice(_read_images(path, fps), frames)
    clip = [np.asarray(_fit(image, size)) for image in images]
    if len(clip) < MIN_FRAMES:
        rate = f" at {fps} fps" if fps and not path.is_dir() else ""
        message = f"{path} has {len(clip)} frames{rate}, needs at least {MIN_FRAMES}: motion needs a longer clip"
        raise UserError(message)
    usable = valid_frames(len(clip), len(clip))
    return np.stack(clip[:usable])  # T x (H, W, 3) -> (T, H, W, 3)


def output_path(path: str | Path) -> Path:
    """The path that `write_video` writes to: an .mp4 becomes a .webp where ffmpeg is absent."""
    path = Path(path)
    if path.suffix == ".mp4" and not ffmpeg.is_installed():
        return path.with_suffix(".webp")
    return path


def write_video(path: str | Path, frames: np.ndarray, fps: float, metadata: dict[str, Any] | None = None) -> Path:
    """Write an mp4 (H.264), or an animated WebP if `path` says so or ffmpeg is absent; return the `output_path`.

    frames: (T, H, W, 3) uint8; an mp4 drops an odd last row or column, as its colors are stored per 2x2 pixels.
    fps: frames per second; a WebP counts whole milliseconds, so 16 fps alternates 62 and 63.
    metadata: JSON-able, kept as the mp4's comment or the WebP's EXIF ImageDescription.
    An older file of that name is replaced, once the new one is complete.
    Raises UserError, with ffmpeg's command if that failed.
    """
    path = Path(path)
    if not _is_clip(frames) or len(frames) == 0 or fps <= 0:
        got = f"{frames.shape} {frames.dtype} and {fps}"
        raise UserError(f"frames must be (T, H, W, 3) uint8 and fps above 0, got {got}: use to_uint8")
    if path.suffix not in (".mp4", ".webp"):
        raise UserError(f"needs a name that ends in .mp4 or .webp, got {path.name}: change the ending")
    target = output_path(path)
    if target != path:
        print(f"no ffmpeg on PATH, so the clip goes to {target}; for an mp4: {ffmpeg.INSTALL}")
    comment = json.dumps(metadata or {})
    with _renamed_when_complete(target) as partial:
        if target.suffix == ".mp4":
            ffmpeg.write_mp4(partial, frames, fps, comment)
        else:
            _write_webp(partial, frames, fps, comment)
    return target


def to_tensor(frames: np.ndarray) -> Tensor:
    """Turn a clip (T, H, W, 3) uint8 into the model's video (1, 3, T, H, W) float32 in [-1, 1].

    Raises UserError on another shape or dtype.
    """
    if not _is_clip(frames):
        raise UserError(f"clip must be (T, H, W, 3) uint8, got {frames.shape} {frames.dtype}: use read_video")
    video = torch.from_numpy(frames).movedim(-1, 0)  # (T, H, W, 3) -> (3, T, H, W)
    video = video.unsqueeze(0)  # (3, T, H, W) -> (1, 3, T, H, W)
    return video.float() / 127.5 - 1


def to_uint8(video: Tensor) -> np.ndarray:
    """Turn a video (1, 3, T, H, W), clamped to [-1, 1], into a clip (T, H, W, 3) uint8 of the nearest pixel values.

    Raises UserError on another shape.
    """
    if video.ndim != 5 or video.shape[:2] != (1, 3):
        raise UserError(f"video must be (1, 3, T, H, W), got {tuple(video.shape)}: convert one video at a time")
    pixels = (video.detach().float().clamp(-1, 1) + 1) * 127.5
    clip = pixels.round().byte().squeeze(0)  # (1, 3, T, H, W) -> (3, T, H, W)
    clip = clip.movedim(0, -1)  # (3, T, H, W) -> (T, H, W, 3)
    return clip.cpu().contiguous().numpy()


def _is_clip(frames: np.ndarray) -> bool:
    return frames.ndim == 4 and frames.shape[-1] == 3 and frames.dtype == np.uint8


def _check_request(size: tuple[int, int] | None, frames: int | None, fps: float | None) -> None:
    if frames is not None and (frames < MIN_FRAMES or frames != valid_frames(frames)):
        usable = max(MIN_FRAMES, valid_frames(frames))
        raise UserError(f"frames must be 4k+1 and at least {MIN_FRAMES}, got {frames}: try {usable}")
    if size is not None and (min(size) < TOKEN_SIZE or tuple(size) != valid_size(size)):
        raise UserError(f"size must be (height, width) in multiples of 16, got {size}: round it with valid_size")
    if fps is not None and fps <= 0:
        raise UserError(f"fps must be above 0, got {fps}: Wan was trained at 16")


def _read_images(path: Path, fps: float | None) -> Iterator[Image.Image]:
    """The frames of a clip one by one, by whatever its kind needs."""
    endings = " ".join(ANIMATION_EXTENSIONS + VIDEO_EXTENSIONS)
    hint = f"give a folder of PNG/JPEG frames, or one of {endings}"
    if not path.exists():
        raise MissingFile(f"no clip at {path}: {hint}")
    if path.is_dir():
        return _read_folder(path)
    extension = path.suffix.lower()
    if extension in ANIMATION_EXTENSIONS or extension in IMAGE_EXTENSIONS:
        return _read_animation(path, fps)
    if extension in VIDEO_EXTENSIONS:
        return ffmpeg.read_frames(path, fps)
    raise UserError(f"{path} is no clip: {hint}")


def _read_folder(folder: Path) -> Iterator[Image.Image]:
    paths = []
    for path in folder.iterdir():
        if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith("."):
            paths.append(path)
    if not paths:
        raise MissingFile(f"no {' '.join(IMAGE_EXTENSIONS)} in {folder}: extract the clip's frames into it")
    paths.sort(key=_natural_order)
    first_size = None
    for path in paths:
        with _unreadable_is_user_error(path), Image.open(path) as file:
            image = _to_rgb(file)
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


def _read_animation(path: Path, fps: float | None) -> Iterator[Image.Image]:
    with _unreadable_is_user_error(path), Image.open(path) as file:
        first = int(getattr(file, "default_image", False))  # an APNG's cover is not part of the animation
        durations = _frame_durations(file, first)
        # Encoders merge equal neighbors into one longer frame: counting in units of the shortest finds them again.
        units = np.rint(np.divide(durations, min(durations))).sum()
        own_fps = units * 1000 / sum(durations)
        indices = [0]
        if len(durations) > 1:
            indices = nearest_frames(durations, fps or own_fps).tolist()
        for index in indices:
            file.seek(first + index)
            yield _to_rgb(file)


def _frame_durations(file: Image.Image, first: int) -> list[float]:
    """Milliseconds of each frame from number `first` on."""
    durations = []
    for index in range(first, getattr(file, "n_frames", 1)):
        file.seek(index)
        file.load()  # only now does a WebP frame know its duration
        duration = file.info.get("duration", 0)
        durations.append(duration if duration > 10 else 100)
    return durations


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":  # 16-bit gray, which Pillow would clip at 255
        image = image.point(lambda value: value * (1 / 257))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _fit(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    if size is not None:
        height, width = size
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)  # Pillow's filters are antialiased
    height, width = valid_size((image.height, image.width))
    if height == 0 or width == 0:
        raise UserError(f"frames must be at least 16x16 pixels, got {image.width}x{image.height}: pass a size")
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _write_webp(path: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    ends = np.arange(len(frames) + 1) * 1000 // fps  # the sums are cut, not the terms, so the total stays exact
    durations = np.diff(ends).astype(int).tolist()
    exif = Image.Exif()
    exif[EXIF_IMAGE_DESCRIPTION] = comment
    options = {"append_images": images[1:], "duration": durations, "quality": 90, "exif": exif}
    images[0].save(path, "WEBP", save_all=True, **options)


@contextmanager
def _unreadable_is_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # on broken bytes Pillow's decoders raise OSError, SyntaxError, IndexError and more
        raise UserError(f"cannot read {path}, it is damaged or no image ({error}): export it again") from error


@contextmanager
def _renamed_when_complete(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` that takes its name after the `with`, or is removed after an error."""
    partial = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise UserError(f"cannot write into {path.parent} ({error.strerror}): choose another folder") from error
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
