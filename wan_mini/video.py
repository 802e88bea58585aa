"""Clips in and out: folders and animations (images.py); mp4, mov and webm through ffmpeg (ffmpeg.py).

A clip is a (T, H, W, 3) uint8 RGB array; the model's video is a (1, 3, T, H, W) float32 tensor in [-1, 1].
Frames are decoded one by one and only those of the clip are kept: a long video costs no more memory than its clip.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from wan_mini import ffmpeg
from wan_mini.config import MAX_FPS, TOKEN_SIZE, valid_frames, valid_size
from wan_mini.cuts import find_cuts
from wan_mini.errors import MissingFile, UserError, check_positive
from wan_mini.files import write_whole
from wan_mini.images import IMAGE_EXTENSIONS, check_regular, read_animation, read_folder
from wan_mini.runs.provenance import SOURCE_TYPE, XMP

ANIMATION_EXTENSIONS = (".gif", ".webp", ".apng")  # an IMAGE_EXTENSIONS file may hold an animation, too
VIDEO_EXTENSIONS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".mpg", ".ts", ".3gp", ".flv")  # need ffmpeg
# How files begin, whatever they are called: messengers' "GIFs" are mp4.
ANIMATION_BYTES = re.compile(rb"GIF8|\x89PNG|\xff\xd8|RIFF....WEBP", re.DOTALL)
VIDEO_BYTES = re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL)
MAX_CLIP_BYTES = 2**32  # of a clip in memory
MIN_FRAMES = 5  # two latent frames, the least that can show motion
EXIF_IMAGE_DESCRIPTION = 0x010E  # the EXIF tag that keeps a WebP's metadata


def read_video(
    path: str | Path, *, size: tuple[int, int] | None = None, frames: int | None = None, fps: float | None = None
) -> np.ndarray:
    """Read a clip: a folder of PNG/JPEG in natural order, a GIF/WebP/APNG, or through ffmpeg an mp4/mov/webm.

    size: (height, width) in pixels, multiples of 16; the aspect is kept and the excess cropped evenly from both sides.
      None keeps the clip's own, cropped to multiples of 16.
    frames: how many to read, 4k+1. None reads all; a shorter clip gives the largest 4k+1 that it has.
    fps: target frame rate, see images.nearest_frames. None keeps the clip's own. A folder has none: image by image.
    Rotation tags are obeyed, transparency lies over white, durations up to 10 ms count as 100 ms (as in browsers).
    Returns (T, H, W, 3) uint8. Raises UserError; MissingFile if there is no clip, no image or no ffmpeg.
    """
    path = Path(path)
    _check_request(size, frames, fps)
    clip: list[np.ndarray] = []
    for image in islice(_read_images(path, fps, frames), frames):
        clip.append(np.asarray(_fit(image, size)))
        if len(clip) * clip[0].nbytes > MAX_CLIP_BYTES:
            raise UserError(f"{path} is too long to be read at once: read fewer frames, or pass a smaller size")
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
    An older file of that name is replaced, once the new one is complete. Where ffmpeg cannot encode, a WebP is written
    instead, and a note says why. Raises UserError.
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
    if target.suffix == ".mp4":
        try:
            with write_whole(target) as partial:
                ffmpeg.write_mp4(partial, frames, fps, comment)
            return target
        except ffmpeg.FfmpegFailed as error:
            target = path.with_suffix(".webp")
            print(f"note: the clip goes to {target} instead, because {error}")
    with write_whole(target) as partial:
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
    if fps is not None:
        check_positive("fps", fps, MAX_FPS)  # Wan was trained at 16


def _read_images(path: Path, fps: float | None, frames: int | None) -> Iterator[Image.Image]:
    """The frames of a clip one by one, by whatever its kind needs: by its first bytes, else by its name."""
    endings = " ".join(ANIMATION_EXTENSIONS + VIDEO_EXTENSIONS)
    hint = f"give a folder of PNG/JPEG frames, or one of {endings}"
    if not path.exists():
        raise MissingFile(f"no clip at {path}: {hint}")
    if path.is_dir():
        return read_folder(path)
    check_regular(path)
    with path.open("rb") as stream:
        start = stream.read(16)
    extension = path.suffix.lower()
    named_animation = extension in ANIMATION_EXTENSIONS + IMAGE_EXTENSIONS
    if not named_animation and extension not in VIDEO_EXTENSIONS:
        raise UserError(f"{path} is no clip: {hint}")
    if ANIMATION_BYTES.match(start) or (named_animation and not VIDEO_BYTES.match(start)):
        return read_animation(path, fps, frames)
    return ffmpeg.read_frames(path, fps)


def remarks(frames: np.ndarray) -> list[str]:
    """What a user should know about a reference clip (T, H, W, 3) uint8 whose motion is to be followed."""
    if (frames == frames[0]).all():
        return ["all frames of the reference are equal: there is no motion to follow"]
    lines = []
    for frame in find_cuts(frames):
        lines.append(f"the reference seems to have a cut before frame {frame}: motion is followed across it")
    return lines


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
    if SOURCE_TYPE in comment:
        options["xmp"] = XMP.encode()
    images[0].save(path, "WEBP", save_all=True, **options)
