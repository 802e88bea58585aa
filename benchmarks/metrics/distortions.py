"""What happens to videos on their way: re-encoding, resizing, cropping, lost frames. The mark must survive them."""

import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from wan_mini.errors import UserError

CRFS = (18, 23, 28, 35)
Distortion = Callable[[np.ndarray], np.ndarray]  # frames (T,H,W,3) uint8 -> of the same height and width


def resized(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    """Each frame, bicubic."""
    images = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(image) for image in images])


def half_size(frames: np.ndarray) -> np.ndarray:
    """Half the height and width, and back."""
    height, width = frames.shape[1:3]
    return resized(resized(frames, width // 2, height // 2), width, height)


def cropped(frames: np.ndarray) -> np.ndarray:
    """Without 5 % on each side, and back to its size."""
    height, width = frames.shape[1:3]
    top = height // 20
    left = width // 20
    return resized(frames[:, top : height - top, left : width - left], width, height)


def brighter(frames: np.ndarray) -> np.ndarray:
    """Every level times 1.1."""
    return np.minimum(np.rint(frames * 1.1), 255).astype(np.uint8)


def first_frame_lost(frames: np.ndarray) -> np.ndarray:
    """From the second frame on, which shifts the VAE's groups of four."""
    return frames[1:]


def trimmed(frames: np.ndarray) -> np.ndarray:
    """Without an eighth of the frames at each end."""
    cut = len(frames) // 8
    return frames[cut : len(frames) - cut]


def mirrored(frames: np.ndarray) -> np.ndarray:
    """Left and right exchanged."""
    return np.ascontiguousarray(frames[:, :, ::-1])


def webp(frames: np.ndarray, quality: int = 80) -> np.ndarray:
    """Each frame through a lossy WebP."""
    decoded = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "WEBP", quality=quality)
        decoded.append(np.asarray(Image.open(file).convert("RGB")))
    return np.stack(decoded)


def h264(crf: int) -> Distortion:
    """Through ffmpeg's libx264 at this quality, 4:2:0."""

    def distort(frames: np.ndarray) -> np.ndarray:
        height, width = frames.shape[1:3]
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "clip.mp4")
            encode = ["-s", f"{width}x{height}", "-framerate", "16", "-i", "-", "-c:v", "libx264", "-crf", str(crf)]
            run_ffmpeg([*raw, *encode, "-pix_fmt", "yuv420p", file], frames.tobytes())
            pixels = run_ffmpeg(["-i", file, *raw, "-"])
        return np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3).copy()  # writable, for torch

    return distort


def run_ffmpeg(words: list[str], pixels: bytes | None = None) -> bytes:
    """What ffmpeg writes to its standard output. Raises UserError if it fails."""
    done = subprocess.run(["ffmpeg", "-v", "error", *words], input=pixels, capture_output=True)
    if done.returncode != 0:
        raise UserError(f"ffmpeg failed: {done.stderr.decode(errors='replace')[:200]}")
    return done.stdout


def distortions() -> dict[str, Distortion]:
    """All that can be done here: those of H.264 need ffmpeg."""
    table: dict[str, Distortion] = {"none": lambda frames: frames}
    if shutil.which("ffmpeg") is not None:
        for crf in CRFS:
            table[f"h264_crf{crf}"] = h264(crf)
    simple = (webp, half_size, cropped, brighter, first_frame_lost, trimmed, mirrored)
    return table | {function.__name__: function for function in simple}
