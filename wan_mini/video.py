"""Clips in and out: picture folders and animations by Pillow, mp4 and its kin through an `ffmpeg` found on PATH.

A clip is a (T, H, W, 3) uint8 RGB array, the model's video a (1, 3, T, H, W) float tensor in [-1, 1].
Pictures are streamed one by one and only the wanted ones are kept: a long film costs no more memory than its clip.
"""

import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from wan_mini.config import valid_frames, valid_size

PICTURES = (".png", ".jpg", ".jpeg")  # a folder's frames
ANIMATIONS = (".gif", ".webp", ".apng", *PICTURES)
FILMS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi")
INSTALL = "apt install ffmpeg, brew install ffmpeg or winget install ffmpeg"
IMAGE_DESCRIPTION = 0x010E  # the EXIF tag that keeps a WebP's metadata


def nearest_frames(durations: Sequence[float], fps: float) -> np.ndarray:
    """Resample in time: the index of the source frame to show for each output frame, at `fps` frames per second.

    durations: milliseconds that each source frame stays on screen. Output frame k shows what is on screen in the
    middle of its interval, at (k + 1/2) / fps; a tie goes to the earlier frame. ffmpeg's fps filter does the same.
    """
    ends = np.cumsum(durations)
    count = round(ends[-1] * fps / 1000)
    middles = (np.arange(count) + 0.5) * 1000 / fps
    return np.searchsorted(ends, middles - 1e-6)  # rounding in the sums must not break a tie


def read_video(
    path: str | Path, *, size: tuple[int, int] | None = None, frames: int | None = None, fps: float | None = None
) -> np.ndarray:
    """Read a clip: a folder of PNG/JPEG in natural order, a GIF/WebP/APNG, or through ffmpeg an mp4/mov/webm.

    size: (height, width) in pixels, multiples of 16; the aspect is kept and the excess cropped evenly from both sides.
      None keeps the clip's own, cropped to multiples of 16.
    frames: how many to read, 4k+1. None reads all; a shorter clip gives the largest 4k+1 that it has.
    fps: wanted frame rate, see `nearest_frames`. None keeps the clip's own. A folder has none: one picture, one frame.
    Rotation tags are obeyed, transparency lies over white, durations up to 10 ms count as 100 ms (as in browsers).
    Returns (T, H, W, 3) uint8. Raises FileNotFoundError (clip, pictures, ffmpeg) or ValueError, in one line.
    """
    path = Path(path)
    if frames is not None and (frames < 5 or frames != valid_frames(frames)):
        raise ValueError(f"frames must be 4k+1 and at least 5, got {frames}: try {max(5, valid_frames(frames))}")
    if size is not None and (min(size) < 16 or tuple(size) != valid_size(size)):
        raise ValueError(f"size must be (height, width) in multiples of 16, got {size}: round it with valid_size")
    if fps is not None and fps <= 0:
        raise ValueError(f"fps must be above 0, got {fps}: Wan was trained at 16")
    clip = [np.asarray(_fit(picture, size)) for picture in islice(_pictures(path, fps), frames)]
    if len(clip) < 5:
        rate = f" at {fps} fps" if fps and not path.is_dir() else ""
        raise ValueError(f"{path} has {len(clip)} frames{rate}, wanted at least 5: motion needs a longer clip")
    usable = valid_frames(len(clip), len(clip))
    return np.stack(clip[:usable])  # T x (H, W, 3) -> (T, H, W, 3)


def write_video(path: str | Path, frames: np.ndarray, fps: float, metadata: dict | None = None) -> Path:
    """Write an mp4 (H.264), or an animated WebP if `path` says so or ffmpeg is absent; return the path really written.

    frames: (T, H, W, 3) uint8; an mp4 drops an odd last row or column, as its colors are stored per 2x2 pixels.
    fps: frames per second; a WebP counts whole milliseconds, so 16 fps alternates 62 and 63.
    metadata: JSON-able, kept as the mp4's comment or the WebP's EXIF ImageDescription.
    The file gets its name only when complete. Raises ValueError in one line, with ffmpeg's command if that failed.
    """
    path = Path(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames) or fps <= 0:
        got = f"{frames.shape} {frames.dtype} and {fps}"
        raise ValueError(f"frames must be (T, H, W, 3) uint8 and fps above 0, got {got}: use from_model")
    if path.suffix not in (".mp4", ".webp"):
        raise ValueError(f"wanted a name that ends in .mp4 or .webp, got {path.name}: change the ending")
    if path.suffix == ".mp4" and shutil.which("ffmpeg") is None:
        path = path.with_suffix(".webp")
        print(f"no ffmpeg on PATH, so the clip goes to {path}; for an mp4: {INSTALL}")
    with _complete_or_absent(path) as partial:
        write = _write_mp4 if path.suffix == ".mp4" else _write_webp
        write(partial, frames, fps, json.dumps(metadata or {}))
    return path


def to_model(frames: np.ndarray) -> torch.Tensor:
    """Turn a clip (T, H, W, 3) uint8 into the model's video (1, 3, T, H, W) float32 in [-1, 1]."""
    video = torch.from_numpy(frames).movedim(-1, 0).unsqueeze(0)  # (T, H, W, 3) -> (3, T, H, W) -> (1, 3, T, H, W)
    return video.float() / 127.5 - 1


def from_model(video: torch.Tensor) -> np.ndarray:
    """Turn a video (1, 3, T, H, W), clamped to [-1, 1], into a clip (T, H, W, 3) uint8 of the nearest levels."""
    levels = (video.detach().float().clamp(-1, 1) + 1) * 127.5
    clip = levels.round().byte().squeeze(0).movedim(0, -1)  # (1, 3, T, H, W) -> (3, T, H, W) -> (T, H, W, 3)
    return clip.cpu().contiguous().numpy()


def _pictures(path: Path, fps: float | None) -> Iterator[Image.Image]:
    wanted = f"a folder of PNG/JPEG frames, or one of {' '.join(ANIMATIONS[:3] + FILMS)}"
    if not path.exists():
        raise FileNotFoundError(f"no clip at {path}: give {wanted}")
    if path.is_dir():
        return _read_folder(path)
    if path.suffix.lower() in ANIMATIONS:
        return _read_animation(path, fps)
    if path.suffix.lower() in FILMS:
        return _read_film(path, fps)
    raise ValueError(f"{path} is no clip: give {wanted}")


def _read_folder(folder: Path) -> Iterator[Image.Image]:
    def natural(path: Path) -> tuple:  # "frame10" -> ["frame", 10, ""], which sorts behind "frame2"
        parts = re.split(r"(\d+)", path.stem.lower())
        return [int(part) if part.isdecimal() else part for part in parts], path.name

    paths = [p for p in folder.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith(".")]
    if not paths:
        raise FileNotFoundError(f"no {' '.join(PICTURES)} in {folder}: extract the clip's frames into it")
    first = None
    for path in sorted(paths, key=natural):
        with _blaming(path), Image.open(path) as image:
            picture = _rgb(image)
        first = first or (path.name, picture.size)
        if picture.size != first[1]:
            sizes = f"{first[0]} has (width, height) = {first[1]}, {path.name} has {picture.size}"
            raise ValueError(f"frames in {folder} must have one size, but {sizes}: resize or remove one")
        yield picture


def _read_animation(path: Path, fps: float | None) -> Iterator[Image.Image]:
    with _blaming(path), Image.open(path) as image:
        first = int(getattr(image, "default_image", False))  # an APNG's cover picture is not part of the animation
        durations = []
        for index in range(first, getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()  # only now does a WebP frame know its duration
            duration = image.info.get("duration", 0)
            durations.append(duration if duration > 10 else 100)
        # Encoders merge equal neighbors into one longer frame: counting in units of the shortest finds them again.
        own_fps = np.rint(np.divide(durations, min(durations))).sum() * 1000 / sum(durations)
        for index in nearest_frames(durations, fps or own_fps) if len(durations) > 1 else [0]:
            image.seek(first + int(index))
            yield _rgb(image)


def _read_film(path: Path, fps: float | None) -> Iterator[Image.Image]:
    if shutil.which("ffmpeg") is None:
        by_hand = "or extract the frames elsewhere (ffmpeg -i clip.mp4 -vf fps=16 frames/%05d.png) and give the folder"
        raise FileNotFoundError(f"no ffmpeg on PATH, which {path} needs: {INSTALL}; {by_hand}")
    # ffmpeg obeys rotation tags itself; the filters do time, square pixels and colors free of rounding bias.
    filters = (f"fps={fps}," if fps else "") + "scale=iw*sar:ih:flags=accurate_rnd+full_chroma_int,format=rgb24"
    source = shlex.quote(str(path.absolute()))
    command = f"ffmpeg -v error -nostdin -xerror -i {source} -map 0:V:0 -vf {filters} -f image2pipe -c:v ppm -"
    with tempfile.TemporaryFile() as log:  # a pipe would fill up unread
        process = subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, stderr=log)
        try:
            while process.stdout.readline():  # PPM is raw rgb24 behind three lines: "P6", "width height", "255"
                width, height = map(int, process.stdout.readline().split())
                process.stdout.readline()
                yield Image.frombytes("RGB", (width, height), process.stdout.read(width * height * 3))
            if process.wait():
                log.seek(0)
                raise _ffmpeg_failed(command, log.readline())
        finally:
            process.kill()  # a reader that has enough stops early, and ffmpeg must not wait for it for ever
            process.communicate()


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":  # 16-bit gray, which Pillow would clip at 255
        image = image.point(lambda level: level * (1 / 257))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _fit(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    if size:
        return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)  # antialiased, as Pillow's filters are
    height, width = valid_size((image.height, image.width))
    if not height or not width:
        raise ValueError(f"frames must be at least 16x16 pixels, got {image.width}x{image.height}: pass a size")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _write_mp4(path: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    h, w = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    command = (
        f"ffmpeg -v error -y -f rawvideo -pix_fmt rgb24 -s {w}x{h} -framerate {fps} -i - "
        "-c:v libx264 -crf 18 -pix_fmt yuv420p -movflags +faststart -vf scale=out_color_matrix=bt709 "
        "-colorspace bt709 -color_primaries bt709 -color_trc bt709 "  # untagged, a player guesses, colors may shift
        f"-metadata comment={shlex.quote(comment)} {shlex.quote(str(path.absolute()))}"
    )
    done = subprocess.run(shlex.split(command), input=frames[:, :h, :w].tobytes(), capture_output=True)
    if done.returncode:
        raise _ffmpeg_failed(command, done.stderr)


def _write_webp(path: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    first, *rest = map(Image.fromarray, frames)
    ends = np.arange(len(frames) + 1) * 1000 // fps  # the sums are cut, not the terms, so the total stays exact
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = comment
    durations = np.diff(ends).astype(int).tolist()
    first.save(path, "WEBP", save_all=True, append_images=rest, duration=durations, quality=90, exif=exif)


def _ffmpeg_failed(command: str, log: bytes) -> ValueError:
    reason = (log.decode(errors="replace").splitlines() or ["it gave no reason"])[0]
    return ValueError(f"ffmpeg failed ({reason}), run it by hand to learn more: {command}")


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # on broken bytes Pillow's decoders raise OSError, SyntaxError, IndexError and more
        raise ValueError(f"cannot read {path}, it is damaged or no picture ({error}): export it again") from error


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    partial = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise ValueError(f"cannot write into {path.parent} ({error.strerror}): choose another folder") from error
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
