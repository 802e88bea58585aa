"""Clips as people have them, and as nobody should send them: each is made here, by Pillow, by hand or by ffmpeg.

Tests that need ffmpeg to make their film are skipped, with that reason, where there is none.
"""

import os
import shutil
import socket
import stat
import struct
import subprocess
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan_mini import ffmpeg, images
from wan_mini.errors import UserError
from wan_mini.tiny.world import make_clip
from wan_mini.video import read_video, remarks

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg on PATH to make a film")
posix = pytest.mark.skipif(os.name != "posix", reason="needs pipes, sockets and shell scripts of POSIX")
LEVELS = range(0, 250, 10)  # one gray level a frame makes its number readable


def make_film(path, *options, source=None, rate=25, alpha=False, count=25, size=(64, 96)):
    """A film of `count` frames; without a source, frame i has the gray level 10 i."""
    height, width = size
    if source is None:
        source = np.broadcast_to(np.array(LEVELS, np.uint8)[:count, None, None, None], (count, height, width, 3))
    kind = "rgba" if alpha else "rgb24"
    command = ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", kind, "-s", f"{width}x{height}"]
    command += ["-framerate", str(rate), "-i", "-", *options, str(path)]
    subprocess.run(command, input=np.ascontiguousarray(source).tobytes(), check=True)
    return path


def run_ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True)


def numbers(clip):
    return np.rint(clip[:, 16:-16, 16:-16].mean((1, 2, 3)) / 10).astype(int).tolist()


def refuses(path, pattern, **request):
    with pytest.raises(UserError, match=pattern) as caught:
        read_video(path, **request)
    assert "\n" not in str(caught.value)


def save_gif(path, pictures, **options):
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, loop=0, **options)
    return path


# What must never run, open or wait.

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A PATH on which every program that a decoder might start leaves a file behind."""
    programs = tmp_path / "programs"
    programs.mkdir()
    sign = tmp_path / "started"
    for name in ("gs", "gswin64c", "inkscape", "magick", "dvips", "cjpeg", "djpeg", "ppmquant"):
        program = programs / name
        program.write_text(f"#!/bin/sh\necho $0 $@ >> {sign}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return sign


@posix
@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.apng", "clip.png", "clip.jpg"])
def test_postscript_starts_no_program(name, tmp_path, canary):
    (tmp_path / name).write_bytes(POSTSCRIPT)
    refuses(tmp_path / name, "cannot read .*damaged or no image")
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (32, 32)).save(folder / f"{i}.png")
    (folder / "5.png").write_bytes(POSTSCRIPT)
    refuses(folder, "cannot read .*5.png.*damaged or no image")
    assert not canary.exists()


@posix
@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "EPS", "PDF", "IM", "SGI"])
def test_other_formats_do_not_reach_their_decoders(kind, tmp_path, canary):
    """Whatever the file is called: only the decoders of images.py run."""
    file = tmp_path / "clip.gif"
    with file.open("wb") as stream:
        Image.new("RGB", (64, 64)).save(stream, kind)
    refuses(file, "cannot read .*damaged or no image")
    assert not canary.exists()


@posix
def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    """A pipe would wait for ever, a device never end."""
    (tmp_path / "zero.gif").symlink_to("/dev/zero")
    refuses(tmp_path / "zero.gif", "is no regular file")
    for name in ("pipe.gif", "pipe.mp4"):
        os.mkfifo(tmp_path / name)
        refuses(tmp_path / name, "is no regular file")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)
        server.bind("s.webp")  # a socket's path must be short
        refuses(tmp_path / "s.webp", "is no regular file")
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32)).save(folder / f"{i}.png")
    os.mkfifo(folder / "4.png")
    refuses(folder, "4.png is no regular file")


@pytest.fixture
def secret(tmp_path):
    """A film that only a playlist's own path leads to."""
    (tmp_path / "secret").mkdir()
    return make_film(tmp_path / "secret/film.ts", "-c:v", "mpeg2video", "-q:v", "2")


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["hls", "concat", "sdp"])
def test_a_playlist_opens_no_other_file(kind, secret, tmp_path):
    text = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{secret}'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    }[kind]
    (tmp_path / "clip.mp4").write_text(text)
    refuses(tmp_path / "clip.mp4", "ffmpeg failed")
    assert len(read_video(secret)) == 25  # which alone is a film


@needs_ffmpeg
def test_no_address_is_contacted(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/film.ts"
        for number, text in enumerate((f"#EXTM3U\n#EXTINF:1,\n{address}\n", f"ffconcat version 1.0\nfile {address}\n")):
            (tmp_path / f"{number}.mp4").write_text(text)
            refuses(tmp_path / f"{number}.mp4", "ffmpeg failed")
        refuses(Path(address), "no clip at")
        with pytest.raises(TimeoutError):
            server.accept()


def fake_ffmpeg(folder, script):
    folder.mkdir()
    program = folder / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(folder)


@posix
@pytest.mark.parametrize(
    ("script", "pattern"),
    [
        ("exec sleep 60", "found no picture .* within 0.5 seconds"),
        ('case "$*" in *image2pipe*) exec sleep 60;; esac; echo "  Stream #0:0: Video: h264" >&2', "gave no picture"),
    ],
)
def test_an_ffmpeg_that_hangs_is_stopped(script, pattern, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "bin", script) + os.pathsep + os.environ["PATH"])
    monkeypatch.setattr(ffmpeg, "TIME_LIMIT", 0.5)
    (tmp_path / "clip.mp4").write_bytes(b"a film")
    refuses(tmp_path / "clip.mp4", pattern)


# Bombs: refused before they are decoded.


def gif_header(width, height):
    return b"GIF89a" + width.to_bytes(2, "little") + height.to_bytes(2, "little") + b"\x80\0\0" + bytes(6)


@pytest.mark.parametrize("side", [6000, 10_000, 20_000, 65_535])
def test_a_huge_picture_is_refused_by_its_header(side, tmp_path):
    picture = b"," + bytes(4) + 2 * side.to_bytes(2, "little") + b"\0\x02\x02L\x01\0;"
    (tmp_path / "clip.gif").write_bytes(gif_header(side, side) + picture)
    (tmp_path / "grows.gif").write_bytes(gif_header(16, 16) + picture)  # its first frame is larger than its screen
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("clip.gif", "grows.gif"):
            tracemalloc.start()
            refuses(tmp_path / name, "pixels|exceeds limit")
            assert tracemalloc.get_traced_memory()[1] < 2e7
            tracemalloc.stop()


def test_a_huge_file_is_refused_by_its_size(tmp_path, monkeypatch):
    save_gif(tmp_path / "clip.gif", [Image.new("L", (64, 64), level) for level in LEVELS])
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    refuses(tmp_path / "clip.gif", r"has \d+ bytes, more than 100")


def test_a_long_time_on_screen_costs_nothing(tmp_path):
    """100 pictures that stand 18 hours each: the frames of the first second are wanted, and nothing else counted."""
    pictures = [Image.new("L", (16, 16), level) for level in range(100)]
    pictures[0].save(tmp_path / "clip.apng", "PNG", save_all=True, append_images=pictures[1:], duration=65_535_000)
    tracemalloc.start()
    clip = read_video(tmp_path / "clip.apng", frames=9, fps=16)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert clip.shape == (9, 16, 16, 3) and not clip.any()
    refuses(tmp_path / "clip.apng", "makes 104856000 frames, more than 10000", fps=16)


def test_many_frames_are_refused_or_left_alone(tmp_path, monkeypatch):
    save_gif(tmp_path / "clip.gif", [Image.new("L", (64, 64), level) for level in LEVELS])
    monkeypatch.setattr(images, "MAX_FRAMES", 12)
    refuses(tmp_path / "clip.gif", "has more than 12 frames")
    assert numbers(read_video(tmp_path / "clip.gif", frames=9, fps=10)) == list(range(9))


@needs_ffmpeg
def test_a_huge_film_is_refused(tmp_path, monkeypatch):
    film = make_film(tmp_path / "clip.mp4", "-pix_fmt", "yuv420p")
    monkeypatch.setattr(ffmpeg, "MAX_PIXELS", 64 * 64)
    refuses(film, "ffmpeg failed")


@needs_ffmpeg
def test_absurd_pixel_shapes_are_bounded(tmp_path):
    film = make_film(tmp_path / "clip.mkv", "-c:v", "mpeg2video", "-aspect", "255:1", "-pix_fmt", "yuv420p")
    assert read_video(film).shape[2] <= 4 * 96


# Files that are not what they are called.


def test_a_gif_named_mp4_needs_no_ffmpeg(tmp_path, monkeypatch):
    save_gif(tmp_path / "a.gif", [Image.new("L", (64, 64), level) for level in LEVELS])
    monkeypatch.setenv("PATH", "")
    assert numbers(read_video((tmp_path / "a.gif").rename(tmp_path / "a.mp4"))) == list(range(25))


@needs_ffmpeg
def test_a_film_named_gif_is_read(tmp_path):
    for container in ("mp4", "webm", "avi"):
        film = make_film(tmp_path / f"clip.{container}", "-pix_fmt", "yuv420p")
        assert numbers(read_video(film.rename(tmp_path / f"{container}.gif"))) == list(range(25))


# Animations.


def gif_frame(left, width, height, pixels, disposal):
    """One frame of a GIF, 8 rows down; its codes are bytes, because the table is cleared before they grow."""
    control = b"!\xf9\x04" + bytes([disposal << 2 | 1, 10, 0, 5]) + b"\0"  # 0.1 s; 5 is transparent
    top = 8 if height == 8 else 0
    frame = b"," + b"".join(n.to_bytes(2, "little") for n in (left, top, width, height)) + b"\0\x07"
    codes = b""
    for start in range(0, len(pixels), 100):
        codes += b"\x80" + pixels[start : start + 100]
    codes += b"\x81"
    blocks = [bytes([len(codes[i : i + 255])]) + codes[i : i + 255] for i in range(0, len(codes), 255)]
    return control + frame + b"".join(blocks) + b"\0"


@pytest.mark.parametrize("disposal", [1, 2, 3])
def test_disposal_of_gif_frames(disposal, tmp_path):
    """A square that walks over a picture: its traces stay (1), or what it covered is cleared (2) or put back (3)."""
    palette = bytes([0, 0, 250, 250, 0, 0]) + bytes(126 * 3)
    data = b"GIF89a" + (48).to_bytes(2, "little") + (32).to_bytes(2, "little") + b"\xe6\0\0" + palette
    data += gif_frame(0, 48, 32, bytes(48 * 32), 1)
    for i in range(6):
        data += gif_frame(8 * i, 8, 8, b"\1" * 64, disposal)
    (tmp_path / "clip.gif").write_bytes(data + b";")
    canvas = np.full((32, 48, 3), (0, 0, 250), np.uint8)
    expected = [canvas.copy()]
    for i in range(4):
        frame = canvas.copy()
        frame[8:16, 8 * i : 8 * i + 8] = (250, 0, 0)
        expected.append(frame.copy())
        if disposal == 1:
            canvas = frame
        if disposal == 2:  # to nothing, which lies over white
            canvas[8:16, 8 * i : 8 * i + 8] = 255
    assert np.array_equal(read_video(tmp_path / "clip.gif", frames=5, fps=10), np.stack(expected))


def test_local_palettes_of_gif_frames(tmp_path):
    colors = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (123, 45, 67), (9, 8, 7)]
    save_gif(tmp_path / "clip.gif", [Image.new("RGB", (32, 32), color).quantize(2) for color in colors])
    assert read_video(tmp_path / "clip.gif")[:, 3, 3].tolist() == [list(color) for color in colors]


def test_exif_turns_an_animation_too(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = [Image.fromarray(make_clip(0).frames[i, :64, :96]) for i in range(5)]
    pictures[0].save(
        tmp_path / "clip.webp", save_all=True, append_images=pictures[1:], duration=100, exif=turned, lossless=True
    )
    clip = read_video(tmp_path / "clip.webp")
    assert np.array_equal(clip, np.stack([np.rot90(np.asarray(picture), -1) for picture in pictures]))


# Films.


@needs_ffmpeg
def test_a_cut_without_encoding_begins_with_its_first_picture(tmp_path):
    """The sound begins at once, the picture where a key frame is: that gap is not filled with copies of the first."""
    sine = ["-f", "lavfi", "-i", "sine=440:d=8"]
    no_more_keys = ["-sc_threshold", "1000000000", "-c:a", "aac"]
    film = make_film(tmp_path / "long.mkv", *sine, "-c:v", "mpeg4", "-q:v", "2", "-g", "20", *no_more_keys, rate=5)
    run_ffmpeg("-i", film, "-ss", "2.1", "-c", "copy", tmp_path / "cut.mkv")
    assert numbers(read_video(tmp_path / "cut.mkv", fps=5)) == [20, 21, 22, 23, 24]
    two = ["-itsoffset", "3", "-i", film, "-i", film, "-map", "0:v", "-map", "1:a", "-c", "copy"]
    run_ffmpeg(*two, tmp_path / "a.mkv")
    assert numbers(read_video(tmp_path / "a.mkv", fps=5)) == list(range(25))
    assert numbers(read_video(tmp_path / "a.mkv")) == list(range(25))


def walking_square():
    """A black square on nothing, (25,64,96,4): over black it would vanish."""
    frames = np.zeros((25, 64, 96, 4), np.uint8)
    for i in range(25):
        frames[i, 16:48, 2 * i : 2 * i + 32, 3] = 255
    return frames


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mov", ("-c:v", "qtrle")),
        ("a.mov", ("-c:v", "png")),
        ("a.mov", ("-c:v", "prores_ks", "-profile:v", "4", "-pix_fmt", "yuva444p10le")),
        ("b.webm", ("-c:v", "libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", "0")),
        ("a.webm", ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-cpu-used", "8", "-deadline", "realtime")),
    ],
)
def test_transparency_of_films_lies_over_white(name, options, tmp_path):
    clip = read_video(make_film(tmp_path / name, *options, source=walking_square(), alpha=True))
    assert len(clip) == 25
    for i in (0, 12, 24):
        assert clip[i, 2:12].min() > 240 and clip[i, 20:44, 2 * i + 4 : 2 * i + 28].max() < 16


@needs_ffmpeg
def test_a_variable_rate_is_resampled_by_time_or_kept_whole(tmp_path):
    """Nine pictures at 0, 100, 200, 300, 400, 800, 1200, 1600, 2000 ms."""
    times = "settb=1/1000,setpts='if(lt(N,5),N,4*N-12)*0.1/TB'"
    options = ["-vf", times, "-fps_mode", "vfr", "-c:v", "mpeg4", "-q:v", "2"]
    film = make_film(tmp_path / "clip.mkv", *options, count=9, rate=10)
    assert numbers(read_video(film)) == list(range(9))
    shown = numbers(read_video(film, fps=10))
    assert shown[:17] == [0, 1, 2, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7]


@needs_ffmpeg
def test_portrait_odd_sizes_ten_bits_and_square_pixels(tmp_path):
    source = make_clip(0).frames[:9, :64, :96]
    good = ["-pix_fmt", "yuv420p", "-crf", "12"]
    deep = make_film(tmp_path / "deep.mp4", "-pix_fmt", "yuv420p10le", "-crf", "12", source=source)
    tall = make_film(tmp_path / "tall.mp4", "-vf", "transpose", *good, source=source)
    odd = make_film(tmp_path / "odd.mkv", "-vf", "crop=95:63:0:0", "-c:v", "ffv1", source=source)
    wide = make_film(tmp_path / "wide.mp4", "-vf", "scale=48:64,setsar=2", *good, source=source)
    assert np.abs(read_video(deep).astype(int) - source).mean() < 4
    assert read_video(tall).shape == (9, 96, 64, 3)
    assert read_video(odd).shape == (9, 48, 80, 3)
    assert read_video(wide).shape == (9, 64, 96, 3)
    assert np.abs(read_video(wide).astype(int) - source).mean() < 8


@needs_ffmpeg
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_tags_are_obeyed(degrees, tmp_path):
    source = make_clip(0).frames[:9, :64, :96]
    film = make_film(tmp_path / "a.mp4", "-pix_fmt", "yuv420p", "-crf", "12", source=source)
    data = bytearray(film.read_bytes())
    start = data.index(b"tkhd") + 44  # the track header's 3x3 matrix: clockwise by so many degrees
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    data[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    film.write_bytes(data)
    clip = read_video(film)
    assert np.abs(clip.astype(int) - np.rot90(source, -degrees // 90, (1, 2))).mean() < 4


@needs_ffmpeg
def test_frames_of_another_size_are_not_lost(tmp_path):
    """A film whose picture becomes smaller on the way, as of a screen or a call: all frames, in their order."""
    levels = np.array(LEVELS, np.uint8)[:25, None, None, None]
    make_film(tmp_path / "a.webm", source=np.broadcast_to(levels[:12], (12, 64, 96, 3)))
    make_film(tmp_path / "b.webm", source=np.broadcast_to(levels[12:], (13, 48, 64, 3)), size=(48, 64))
    (tmp_path / "list.txt").write_text("file a.webm\nfile b.webm\n")
    run_ffmpeg("-f", "concat", "-i", tmp_path / "list.txt", "-c", "copy", tmp_path / "c.webm")
    assert numbers(read_video(tmp_path / "c.webm", size=(64, 96))) == list(range(25))


@needs_ffmpeg
def test_high_dynamic_range_is_noted(tmp_path, capsys):
    tags = ["-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc"]
    hdr = make_film(tmp_path / "a.mp4", "-pix_fmt", "yuv420p10le", "-vf", "setparams=color_trc=smpte2084", *tags)
    read_video(hdr)
    assert "note:" in (printed := capsys.readouterr().out) and "high dynamic range (smpte2084)" in printed
    read_video(make_film(tmp_path / "b.mp4", "-pix_fmt", "yuv420p"))
    assert capsys.readouterr().out == ""


@needs_ffmpeg
def test_sound_alone_is_no_clip(tmp_path):
    run_ffmpeg("-f", "lavfi", "-i", "sine=440:d=1", tmp_path / "sound.mp4")
    refuses(tmp_path / "sound.mp4", "has no picture, only sound")


@needs_ffmpeg
def test_damaged_and_open_films_are_refused_with_a_way_on(tmp_path):
    whole = make_film(tmp_path / "a.mp4", "-pix_fmt", "yuv420p", source=make_clip(0).frames[:25, :64, :96]).read_bytes()
    moov = whole.index(b"moov") - 4
    for name, content in {
        "open.mp4": whole[:moov],  # a recording that was never closed
        "half.mp4": whole[: len(whole) // 2],
        "text.mp4": b"hello world\n" * 100,
        "empty.mp4": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        refuses(tmp_path / name, "ffmpeg failed .*: is it a whole video.* run it by hand")
    damaged = bytearray(whole)
    damaged[moov // 2 : moov // 2 + 24] = bytes(24)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    refuses(tmp_path / "damaged.mp4", "ffmpeg failed .*: encode it anew .*libx264 new.mp4")


# What a clip lacks, or has too much of.


def test_a_cut_and_a_still_are_remarked():
    clip = make_clip(0).frames
    assert remarks(clip) == [] and remarks(clip[::2].repeat(2, 0)) == []
    assert "no motion" in remarks(clip[:1].repeat(9, 0))[0]
    dark = np.concatenate([clip[:7], 255 - clip[7:14]])
    assert "cut before frame 7" in remarks(dark)[0]
