"""What our side of ffmpeg does, with a small script in its place: tests of films that need no ffmpeg.

What ffmpeg itself must do (rotation, time stamps, colors, its allow-lists) is in test_media.py and test_video.py.
"""

import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from wan_mini.errors import UserError
from wan_mini.ffmpeg import read_comment
from wan_mini.images import MAX_PIXELS
from wan_mini.video import read_video, write_video

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the script is one of a POSIX shell")

VIDEO = "  Stream #0:0[0x1](und): Video: h264 (High) (avc1 / 0x31637661), yuv420p(tv, bt709), 48x32, 25 fps\n"
SOUND = "  Stream #0:1[0x2](und): Audio: aac (LC) (mp4a / 0x6134706D), 44100 Hz, mono\n"
COVER = "  Stream #0:0[0x0]: Video: mjpeg (Baseline), yuvj420p, 300x300 (attached pic)\n"
ANNOUNCED = "Input #0, mov,mp4, from 'clip.mp4':\n  Duration: 00:00:01.00, start: 0.000000\n"
MP4 = b"\0\0\0\x20ftypisom" + bytes(20)
SCRIPT = """#!/bin/sh
echo "$@" >>{folder}/calls
case "$*" in
*-hide_banner*) cat {folder}/streams >&2; exit 1;;
*rawvideo*) for last; do :; done; cat >"$last"; exit {status};;
esac
cat {folder}/pictures
cat {folder}/log >&2
exit {status}
"""


def pam(frames: np.ndarray) -> bytes:
    """Frames (T,H,W,4) as ffmpeg pipes them."""
    parts = []
    for frame in frames:
        height, width = frame.shape[:2]
        header = f"P7\nWIDTH {width}\nHEIGHT {height}\nDEPTH 4\nMAXVAL 255\nTUPLTYPE RGB_ALPHA\nENDHDR\n"
        parts += [header.encode(), frame.tobytes()]
    return b"".join(parts)


FRAMES = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 4), dtype=np.uint8)
FRAMES[..., 3] = 255


class Film:
    """A film and the ffmpeg that reads it, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "clip.mp4"
        self.path.write_bytes(MP4)
        self.set()

    def set(self, pictures: bytes = pam(FRAMES), streams: str = VIDEO, log: str = "", status: int = 0) -> None:
        """What it says of the file's streams, the pictures it gives, what it complains of, and how it ends."""
        (self.folder / "pictures").write_bytes(pictures)
        (self.folder / "streams").write_text(ANNOUNCED + streams)
        (self.folder / "log").write_text(log)
        script = self.folder / "ffmpeg"
        script.write_text(SCRIPT.format(folder=shlex.quote(str(self.folder)), status=status))
        script.chmod(0o755)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def film(tmp_path, monkeypatch) -> Film:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return Film(tmp_path)


def refuses(film: Film, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as error:
        read_video(film.path)
    assert "\n" not in str(error.value)


def test_pictures_arrive_as_they_were_sent(film):
    assert np.array_equal(read_video(film.path), FRAMES[..., :3])
    assert np.array_equal(read_video(film.path, frames=5), FRAMES[:5, ..., :3])  # which stops reading early


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".MOV"])
def test_a_film_of_another_name_is_read(film, suffix):
    """Messengers call an mp4 a GIF: the first bytes tell."""
    film.path = film.path.rename(film.folder / f"clip{suffix}")
    assert np.array_equal(read_video(film.path), FRAMES[..., :3])


def test_transparency_lies_over_white(film):
    frames = FRAMES.copy()
    frames[:, :, :16, 3] = 0
    frames[:, :, 16:32, 3] = 51  # a fifth
    film.set(pam(frames))
    clip = read_video(film.path)
    assert (clip[:, :, :16] == 255).all() and np.array_equal(clip[:, :, 32:], frames[:, :, 32:, :3])
    expected = frames[:, :, 16:32, :3] / 5 + 255 * 4 / 5
    assert np.abs(clip[:, :, 16:32] - expected).max() <= 1


@pytest.mark.parametrize(("codec", "decoder"), [("vp9", "libvpx-vp9"), ("vp8", "libvpx"), ("prores", None)])
@pytest.mark.parametrize("alpha", [True, False])
def test_decoders_that_know_transparency_are_asked_for(film, codec, decoder, alpha):
    """ffmpeg's own decoders of VP8 and VP9 leave the second stream out."""
    tag = "    Metadata:\n      alpha_mode      : 1\n" if alpha else ""
    film.set(streams=VIDEO.replace("h264 (High)", codec) + tag)
    read_video(film.path)
    asked = f"-c:v {decoder} -i" in film.calls()[-1]
    assert asked == (alpha and decoder is not None) and "format=rgba" in film.calls()[-1]


def test_a_high_dynamic_range_is_noted(film, capsys):
    film.set(streams=VIDEO.replace("bt709", "bt2020nc/bt2020/smpte2084"))
    read_video(film.path)
    assert "clip.mp4 has a high dynamic range (smpte2084), its colors come out pale" in capsys.readouterr().out
    film.set()
    read_video(film.path)
    assert capsys.readouterr().out == ""


def test_sound_alone_is_no_clip(film):
    film.set(streams=SOUND)
    refuses(film, "clip.mp4 has no picture, only sound or text: give a video")
    film.set(streams=COVER + SOUND)  # a song's cover is no film
    refuses(film, "clip.mp4 has no picture")
    film.set(streams=COVER + VIDEO + SOUND)
    assert read_video(film.path).shape == (9, 32, 48, 3)
    assert "0:V:0" in film.calls()[-1]  # of which ffmpeg leaves covers out, too
    film.set(streams="clip.mp4: Invalid data found when processing input\n")
    refuses(film, "ffmpeg failed .*Invalid data found.*is it a whole video")


def test_an_ffmpeg_that_cannot_start_leaves_a_way_on(film, capsys, monkeypatch):
    """A program of another machine, say: a film is refused in one line, and a result becomes a WebP."""
    (film.folder / "ffmpeg").write_bytes(b"\x7fELF")
    monkeypatch.setenv("PATH", str(film.folder))  # where there is no other
    refuses(film, r"ffmpeg failed \(.*Exec format error.*: install it again")
    written = write_video(film.folder / "result.mp4", FRAMES[..., :3].copy(), 16)
    assert written.name == "result.webp" and read_video(written).shape == (9, 32, 48, 3)
    assert "result.webp instead, because ffmpeg failed" in capsys.readouterr().out


@pytest.mark.parametrize("comment", ['{"seed": 7, "prompt": "a=b; #1 \\\\ \\n"}', ""])
def test_the_comment_of_a_film(film, comment):
    """As ffmpeg prints metadata: some characters behind a backslash, the comment anywhere among other fields."""
    escaped = re.sub(r"([=;#\\\n])", r"\\\1", comment)
    fields = f";FFMETADATA1\nmajor_brand=isom\ncomment={escaped}\nencoder=Lavf\n"
    film.set(pictures=fields.encode())
    assert read_comment(film.path) == comment
    assert "-protocol_whitelist file" in film.calls()[-1] and film.calls()[-1].endswith("-f ffmetadata -")


def test_a_film_that_says_nothing_has_no_comment(film):
    film.set(pictures=b";FFMETADATA1\nencoder=Lavf\n")
    assert read_comment(film.path) == ""
    film.set(pictures=b";FFMETADATA1\ncomment=" + b"x" * 2**21)
    assert read_comment(film.path) == ""  # longer than any that a run writes
    film.set(pictures=b"", status=1, log="damaged\n")
    assert read_comment(film.path) == ""
    (film.folder / "ffmpeg").write_bytes(b"\x7fELF")
    assert read_comment(film.path) == ""


def test_damage_is_refused_with_a_way_on(film):
    film.set(log="[h264] error while decoding MB 3 4\n", status=1)
    refuses(film, "error while decoding MB 3 4.*encode it anew .ffmpeg -i .*clip.mp4 -c:v libx264 new.mp4")
    assert np.array_equal(read_video(film.path, frames=5), FRAMES[:5, ..., :3])  # behind what is asked for
    film.set(pam(FRAMES)[:-100])  # a last picture that is cut
    assert read_video(film.path).shape == (5, 32, 48, 3)
    film.set(b"")
    refuses(film, "clip.mp4 has 0 frames, needs at least 5")


def test_a_huge_picture_is_refused_by_its_header(film):
    side = int(MAX_PIXELS**0.5) + 9
    header = pam(FRAMES[:1])[:99].replace(b"WIDTH 48", b"WIDTH %d" % side).replace(b"HEIGHT 32", b"HEIGHT %d" % side)
    film.set(header)
    refuses(film, f"{side}")


def test_an_endless_film_gives_what_is_asked_for(film):
    script = film.folder / "ffmpeg"
    script.write_text(
        script.read_text().replace(
            "cat " + shlex.quote(str(film.folder)) + "/pictures",
            "while cat " + shlex.quote(str(film.folder)) + "/pictures; do :; done",
        )
    )
    assert np.array_equal(read_video(film.path, frames=13)[9:], FRAMES[:4, ..., :3])


def test_an_mp4_is_written_from_raw_pixels(film, monkeypatch):
    """Even sides, rate and size in the command; what ffmpeg leaves takes the name."""
    frames = FRAMES[:, :31, :47, :3]
    path = write_video(film.folder / "out.mp4", frames, 12.5, {"seed": 3})
    assert path.read_bytes() == np.ascontiguousarray(frames[:, :30, :46]).tobytes()
    call = film.calls()[-1]
    assert "-s 46x30" in call and "-framerate 12.5" in call and 'comment={"seed": 3}' in call
    film.set(status=1)
    assert write_video(film.folder / "other.mp4", frames, 12.5).suffix == ".webp"
    assert not (film.folder / "other.mp4").exists() and not list(film.folder.glob(".*"))
