"""Videos in and out through an `ffmpeg` found on PATH: the commands, and the pipes to them.

Whoever sends a video chooses its bytes. So ffmpeg may open this one file only (no network, no second file) as one of a
few containers (no playlists), of pictures up to a size, and is stopped if it gives no picture for a while.
"""

import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from wan_mini.errors import MissingFile, UserError
from wan_mini.images import MAX_PIXELS, check_pixels, to_rgb

INSTALL = "apt install ffmpeg, brew install ffmpeg or winget install ffmpeg"
CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,flv"
TIME_LIMIT = 60.0  # seconds without a picture
# Alpha lies in a second stream, which ffmpeg's own decoders of these leave out.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
LONGEST_ARGUMENT = 100_000  # bytes; Linux passes on 131,071, Windows 32,767 of a whole command
LONGEST_METADATA = 2**20  # characters of a video's metadata that are read
HDR = ("smpte2084", "arib-std-b67")  # transfer functions: PQ and HLG


class FfmpegFailed(UserError):
    """ffmpeg ended with an error: its first line, and the command."""


def is_installed() -> bool:
    """Whether there is an ffmpeg on PATH."""
    return shutil.which("ffmpeg") is not None


def read_frames(path: Path, fps: float | None) -> Iterator[Image.Image]:
    """Decode a video frame by frame: upright, of square pixels, over white, RGB; fps: resampled to it, None: all.

    Prints a note about high dynamic range, which is not mapped to the range of a screen.
    Raises MissingFile without ffmpeg, UserError with ffmpeg's command if that failed.
    """
    if not is_installed():
        by_hand = "ffmpeg -i clip.mp4 -vf setpts=PTS-STARTPTS,fps=16 frames/%05d.png"
        way_on = f"{INSTALL}; or extract the frames elsewhere ({by_hand}) and give the folder"
        raise MissingFile(f"no ffmpeg on PATH, which {path} needs: {way_on}")
    picture = describe_picture(path)
    for transfer in HDR:
        if transfer in picture:
            print(f"note: {path} has a high dynamic range ({transfer}), its colors come out pale: convert it first")
    decoder = None
    if "alpha_mode" in picture:
        decoder = ALPHA_DECODERS.get(re.split("[ ,]", picture)[0])
    yield from _decode(path, decode_command(path, fps, decoder))


def _decode(path: Path, command: list[str]) -> Iterator[Image.Image]:
    with tempfile.TemporaryFile() as log:  # a pipe that nobody reads would fill up and stop ffmpeg
        with _able_to_start(command):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        try:
            while True:
                with _stopped_after(process, TIME_LIMIT, path):
                    image = _read_pam(path, process.stdout)
                if image is None:
                    break
                yield to_rgb(image)
            if process.wait() != 0:
                log.seek(0)
                mend = f"ffmpeg -i {shlex.quote(str(path))} -c:v libx264 new.mp4"
                raise _ffmpeg_failed(command, log.readline(), f"encode it anew ({mend}), or ")
        finally:
            process.kill()  # a reader that has all its frames stops early; ffmpeg must not wait for it
            process.communicate()


@contextmanager
def _stopped_after(process: subprocess.Popen[bytes], seconds: float, path: Path) -> Iterator[None]:
    """End the process, and raise UserError, if what is done meanwhile takes longer."""
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if late.is_set():
        raise UserError(f"{path} gave no picture within {seconds:g} seconds: is it whole? Encode it anew, or smaller")


def describe_picture(path: Path) -> str:
    """What ffmpeg says of a file's first picture stream, from its codec on: "h264 (High), yuv420p(tv), 192x128, ...".

    Raises UserError if the file has none, or is no video that may be read.
    """
    command = ["ffmpeg", "-hide_banner", *_input_options(), "-i", str(path.absolute())]
    try:
        with _able_to_start(command):
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        raise UserError(f"ffmpeg found no picture in {path} within {TIME_LIMIT:g} seconds: is it whole?") from None
    log = done.stderr.decode(errors="replace")
    streams = log.split("  Stream #")[1:]
    for stream in streams:
        kind, _, described = stream.partition("Video: ")
        if described and "\n" not in kind and "(attached pic)" not in described:
            return described
    if streams:
        raise UserError(f"{path} has no picture, only sound or text: give a video")
    reason = log.strip().split("\n")[-1].encode()
    raise _ffmpeg_failed(["ffmpeg", "-v", "error", *command[2:]], reason, "is it a whole video? Or ")


def _input_options() -> list[str]:
    return ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS, "-max_pixels", str(MAX_PIXELS)]


def decode_command(path: Path, fps: float | None, decoder: str | None = None) -> list[str]:
    """The command that writes a video's frames to stdout, as PAM images; decoder: None for ffmpeg's own choice."""
    # ffmpeg obeys rotation tags itself; the filters do time, square pixels and colors free of rounding bias.
    # A stream that begins later than the file's sound is moved to the beginning: else its first picture fills the gap.
    time_filters = f"setpts=PTS-STARTPTS,fps={fps}"
    if not fps:
        time_filters = "settb=1/25,setpts=N,fps=25"  # numbered anew: none of a variable rate is dropped or repeated
    filters = f"{time_filters},scale=iw*clip(sar\\,0.25\\,4):ih:flags=accurate_rnd+full_chroma_int,format=rgba"
    # Threads by frame would race with -xerror, so that a damaged film is refused or not by chance. Without
    # -reinit_filter 0, times would begin again where the size of the picture changes, and frames be lost.
    command = ["ffmpeg", "-v", "error", "-nostdin", "-xerror", "-thread_type", "slice", "-reinit_filter", "0"]
    command += _input_options()
    if decoder is not None:
        command += ["-c:v", decoder]
    command += ["-i", str(path.absolute()), "-map", "0:V:0", "-vf", filters]
    command += ["-f", "image2pipe", "-c:v", "pam", "-"]
    return command


def _read_pam(path: Path, stream: IO[bytes]) -> Image.Image | None:
    """The next RGBA image of a stream, None at its end. PAM is raw pixels after lines such as P7, WIDTH 96, ENDHDR."""
    header: dict[bytes, bytes] = {}
    while b"ENDHDR" not in header:
        line = stream.readline(100)
        if not line:
            return None
        name, _, value = line.strip().partition(b" ")
        header[name] = value
    size = int(header[b"WIDTH"]), int(header[b"HEIGHT"])
    check_pixels(path, size)
    count = size[0] * size[1] * 4
    pixels = stream.read(count)
    if len(pixels) < count:
        return None
    return Image.frombytes("RGBA", size, pixels)


def read_comment(path: Path) -> str:
    """The comment in a video's metadata, where a run keeps its settings; "" if there is none, or it cannot be read."""
    command = ["ffmpeg", "-v", "error", "-nostdin", *_input_options(), "-i", str(path.absolute())]
    command += ["-f", "ffmetadata", "-"]
    try:
        with _able_to_start(command):
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIME_LIMIT)
    except (FfmpegFailed, subprocess.TimeoutExpired):
        return ""
    text = done.stdout.decode(errors="replace")
    if len(text) > LONGEST_METADATA:
        return ""
    comment = re.search(r"^comment=((?:[^\\\n]|\\[\s\S])*)", text, re.MULTILINE)
    if comment is None:
        return ""
    return re.sub(r"\\([\s\S])", r"\1", comment[1])


def write_mp4(path: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    """Encode frames (T, H, W, 3) uint8 as H.264; an odd last row or column is dropped.

    Raises UserError with ffmpeg's command if that failed.
    """
    height = frames.shape[1] // 2 * 2
    width = frames.shape[2] // 2 * 2
    pixels = frames[:, :height, :width].tobytes()
    tags = ["-metadata", f"comment={comment}"]
    inputs: list[str] = []
    file = path.with_suffix(".txt").absolute()
    try:
        if len(comment.encode()) > LONGEST_ARGUMENT:
            file.write_text(f";FFMETADATA1\ncomment={_escaped(comment)}\n", encoding="utf-8")
            inputs = ["-f", "ffmetadata", "-i", str(file)]
            tags = ["-map_metadata", "1"]
        command = encode_command(path, f"{width}x{height}", fps, tags, inputs)
        with _able_to_start(command):
            process = subprocess.run(command, input=pixels, capture_output=True)
    finally:
        file.unlink(missing_ok=True)
    if process.returncode != 0:
        raise _ffmpeg_failed(command, process.stderr)


def _escaped(text: str) -> str:
    """A value as ffmpeg's metadata files have it."""
    return re.sub(r"([=;#\\\n])", r"\\\1", text)


def encode_command(path: Path, size: str, fps: float, tags: list[str], inputs: list[str]) -> list[str]:
    """The command that encodes raw rgb24 frames of a size such as "832x480" from stdin.

    tags: the metadata's options; inputs: those of files beside the frames.
    """
    command = ["ffmpeg", "-v", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-framerate", str(fps), "-i", "-", *inputs]
    command += ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    command += ["-vf", "scale=out_color_matrix=bt709"]  # a player guesses the colors of an untagged file
    command += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
    return [*command, *tags, str(path.absolute())]


@contextmanager
def _able_to_start(command: list[str]) -> Iterator[None]:
    """Raises FfmpegFailed if there is an ffmpeg that the system cannot run, such as one of another machine."""
    try:
        yield
    except OSError as error:
        raise _ffmpeg_failed(command, str(error).encode(), f"install it again ({INSTALL}), or ") from None


def _ffmpeg_failed(command: list[str], log: bytes, mend: str = "") -> FfmpegFailed:
    lines = log.decode(errors="replace").splitlines() or ["it gave no reason"]
    return FfmpegFailed(f"ffmpeg failed ({lines[0]}): {mend}run it by hand to learn more: {shlex.join(command)}")
