"""Videos in and out through an `ffmpeg` found on PATH: the two commands, and the pipes to them."""

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from wan_mini.errors import MissingFile, UserError

INSTALL = "apt install ffmpeg, brew install ffmpeg or winget install ffmpeg"


def is_installed() -> bool:
    """Whether there is an ffmpeg on PATH."""
    return shutil.which("ffmpeg") is not None


def read_frames(path: Path, fps: float | None) -> Iterator[Image.Image]:
    """Decode a video frame by frame: upright, of square pixels, RGB; fps: resampled to it, None: its own rate.

    Raises MissingFile without ffmpeg, UserError with ffmpeg's command if that failed.
    """
    if not is_installed():
        by_hand = "or extract the frames elsewhere (ffmpeg -i clip.mp4 -vf fps=16 frames/%05d.png) and give the folder"
        raise MissingFile(f"no ffmpeg on PATH, which {path} needs: {INSTALL}; {by_hand}")
    command = decode_command(path, fps)
    with tempfile.TemporaryFile() as log:  # a pipe that nobody reads would fill up and stop ffmpeg
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        try:
            image = _read_ppm(process.stdout)
            while image is not None:
                yield image
                image = _read_ppm(process.stdout)
            if process.wait() != 0:
                log.seek(0)
                raise _ffmpeg_failed(command, log.readline())
        finally:
            process.kill()  # a reader that has all its frames stops early; ffmpeg must not wait for it
            process.communicate()


def decode_command(path: Path, fps: float | None) -> list[str]:
    """The command that writes a video's frames to stdout, as PPM images."""
    # ffmpeg obeys rotation tags itself; the filters do time, square pixels and colors free of rounding bias.
    filters = "scale=iw*sar:ih:flags=accurate_rnd+full_chroma_int,format=rgb24"
    if fps:
        filters = f"fps={fps},{filters}"
    command = ["ffmpeg", "-v", "error", "-nostdin", "-xerror"]
    command += ["-i", str(path.absolute()), "-map", "0:V:0", "-vf", filters]
    command += ["-f", "image2pipe", "-c:v", "ppm", "-"]
    return command


def _read_ppm(stream: IO[bytes]) -> Image.Image | None:
    """The next image of a stream, None at its end. PPM is raw rgb24 after three lines: P6, width and height, 255."""
    if not stream.readline():
        return None
    width, height = map(int, stream.readline().split())
    stream.readline()
    pixels = stream.read(width * height * 3)
    return Image.frombytes("RGB", (width, height), pixels)


def write_mp4(path: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    """Encode frames (T, H, W, 3) uint8 as H.264; an odd last row or column is dropped.

    Raises UserError with ffmpeg's command if that failed.
    """
    height = frames.shape[1] // 2 * 2
    width = frames.shape[2] // 2 * 2
    command = encode_command(path, f"{width}x{height}", fps, comment)
    pixels = frames[:, :height, :width].tobytes()
    process = subprocess.run(command, input=pixels, capture_output=True)
    if process.returncode != 0:
        raise _ffmpeg_failed(command, process.stderr)


def encode_command(path: Path, size: str, fps: float, comment: str) -> list[str]:
    """The command that encodes raw rgb24 frames of a size such as "832x480" from stdin."""
    command = ["ffmpeg", "-v", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-framerate", str(fps), "-i", "-"]
    command += ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    command += ["-vf", "scale=out_color_matrix=bt709"]  # a player guesses the colors of an untagged file
    command += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
    command += ["-metadata", f"comment={comment}", str(path.absolute())]
    return command


def _ffmpeg_failed(command: list[str], log: bytes) -> UserError:
    lines = log.decode(errors="replace").splitlines() or ["it gave no reason"]
    return UserError(f"ffmpeg failed ({lines[0]}), run it by hand to learn more: {shlex.join(command)}")
