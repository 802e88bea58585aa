"""Clips in and out, with and without ffmpeg: where it is missing, a video must be refused with a hint."""

import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wan_mini import ffmpeg
from wan_mini.config import valid_frames
from wan_mini.errors import UserError
from wan_mini.images import nearest_frames
from wan_mini.video import (
    output_path,
    read_video,
    to_tensor,
    to_uint8,
    write_video,
)


def moving_square(frames=17, height=64, width=96):
    """A light square that walks right and down over a color gradient: (T, H, W, 3) uint8."""
    rows, columns = np.mgrid[:height, :width]
    still = np.stack([rows * 255 / height, columns * 255 / width, np.full_like(rows, 90.0)], -1)
    clip = np.repeat(still[None], frames, 0).astype(np.uint8)  # (H, W, 3) -> (T, H, W, 3)
    for t in range(frames):
        clip[t, 8 + t : 24 + t, 8 + 2 * t : 24 + 2 * t] = (250, 230, 40)
    return clip


def levels(values, height=32, width=32):
    """One flat gray frame per value, which makes a frame's number readable from its pixels."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), height, width, 3)).copy()


def numbers(clip, step):
    """Undo `levels` after lossy coding: the frame numbers of a clip whose frame i had the level i * step."""
    return np.rint(clip[:, 8:-8, 8:-8].mean((1, 2, 3)) / step).astype(int).tolist()


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def save_folder(folder, clip, name="frame{}.png"):
    folder.mkdir()
    for i, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / name.format(i))
    return folder


def save_animation(path, clip, durations):
    first, *rest = map(Image.fromarray, clip)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=durations, **lossless)
    return path


def mp4_or_hint(path, clip, fps=16, metadata=None):
    """The mp4 written, where there is ffmpeg; elsewhere prove that a video is refused with a hint, and return None."""
    if shutil.which("ffmpeg"):
        return write_video(path, clip, fps, metadata)
    path.write_bytes(b"a video")
    with pytest.raises(FileNotFoundError, match="no ffmpeg on PATH.*install ffmpeg.*extract the frames"):
        read_video(path)
    return None


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# numbers


def test_nearest_frames_by_hand():
    # 30 -> 16: frame k looks at source 1.875 (k + 1/2) = 0.94, 2.81, 4.69, 6.56, 8.44, 10.31, 12.19, 14.06, 15.94.
    assert nearest_frames([1000 / 30] * 30, 16)[:9].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert len(nearest_frames([1000 / 30] * 30, 16)) == 16
    assert nearest_frames([1000 / 8] * 4, 16).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert nearest_frames([1000 / 30] * 300, 15).tolist() == list(range(0, 300, 2))  # every one a tie: the earlier wins
    assert nearest_frames([100, 300, 50, 50], 10).tolist() == [0, 1, 1, 1, 2]  # middles at 50, 150, 250, 350, 450 ms
    assert nearest_frames([62, 63] * 40 + [62], 16).tolist() == list(range(81))


def test_tensor_and_uint8_round_trip_is_exact_for_every_level():
    clip = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3).repeat(5, 0)  # -> (5, 16, 16, 3)
    video = to_tensor(clip)
    assert video.shape == (1, 3, 5, 16, 16) and video.dtype == torch.float32
    assert video.min() == -1 and video.max() == 1
    assert np.array_equal(to_uint8(video), clip)
    clip[2, 3, 4] = (10, 20, 30)
    assert (to_tensor(clip)[0, :, 2, 3, 4] * 127.5 + 127.5).tolist() == pytest.approx([10, 20, 30], abs=1e-4)


def test_to_uint8_clamps_and_rounds_in_any_float_type():
    video = torch.tensor([-3.0, -1.0, 0.0, 1.0, 1.5]).reshape(1, 1, 5, 1, 1).expand(1, 3, 5, 2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        assert to_uint8(video.to(dtype))[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]  # 127.5 goes to the even 128


def test_wrong_shapes_are_refused_before_they_become_a_video():
    for clip in (np.zeros((5, 16, 16, 3)), np.zeros((3, 5, 16, 16), np.uint8)):
        with pytest.raises(UserError, match=r"clip must be \(T, H, W, 3\) uint8, got"):
            to_tensor(clip)
    for shape in ((2, 3, 5, 16, 16), (3, 5, 16, 16), (1, 16, 5, 2, 2)):
        with pytest.raises(UserError, match=r"video must be \(1, 3, T, H, W\), got"):
            to_uint8(torch.zeros(shape))


# folders


def test_folder_is_read_in_natural_order(tmp_path):
    folder = save_folder(tmp_path / "frames", levels(range(0, 130, 10)))  # frame10 sorts before frame2 as text
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._frame1.png").write_bytes(b"what macOS leaves behind")
    assert numbers(read_video(folder), 10) == list(range(13))
    assert numbers(read_video(folder, frames=5, fps=16), 10) == [0, 1, 2, 3, 4]


def test_folder_is_lossless_and_extra_frames_are_dropped(tmp_path):
    clip = moving_square(15)
    assert np.array_equal(read_video(save_folder(tmp_path / "frames", clip)), clip[:13])


def test_own_size_is_cropped_in_the_middle(tmp_path):
    clip = moving_square(5, 70, 101)
    assert np.array_equal(read_video(save_folder(tmp_path / "frames", clip)), clip[:, 3:67, 2:98])


def test_resize_keeps_the_aspect_and_the_middle_of_a_gradient(tmp_path):
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    clip = np.broadcast_to(ramp[None, None, :, None], (5, 64, 256, 3))  # level = column
    small = read_video(save_folder(tmp_path / "frames", clip), size=(32, 64))
    assert small.shape == (5, 32, 64, 3)
    # Scale 1/2 leaves 128 of 256 columns, 64..191; output column j covers 64 + 2j and 65 + 2j.
    assert np.abs(small[0, 16, 1:-1, 0] - (64.5 + 2 * np.arange(1, 63))).max() <= 1
    tall = read_video(tmp_path / "frames", size=(128, 64))  # enlarged twice, then 32 columns from 112..143 remain
    assert np.abs(tall[0, 64, :, 0] - (111.75 + np.arange(64) / 2)).max() <= 1


def test_shrinking_is_antialiased(tmp_path):
    stripes = levels([0] * 5, 128, 128)
    stripes[:, :, ::2] = 255  # the finest pattern there is must become its mean, not one of its two colors
    small = read_video(save_folder(tmp_path / "frames", stripes), size=(32, 32))
    assert np.abs(small[:, :, 4:-4].astype(int) - 128).max() <= 4


def test_alpha_palette_gray_and_exif_become_upright_rgb(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    base = Image.fromarray(moving_square(1, 32, 32)[0])
    base.save(folder / "0.png")
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(folder / "1.png")
    base.convert("P").save(folder / "2.png")
    Image.new("L", (32, 32), 77).save(folder / "3.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # stored lying on its left side, to be shown turned by 90 degrees clockwise
    picture = Image.new("RGB", (32, 32))
    picture.paste((255, 255, 255), (0, 0, 32, 8))  # a bar at the stored top belongs to the shown right
    picture.save(folder / "4.jpg", exif=turned, quality=95)
    Image.fromarray(np.full((32, 32), 100 * 257, np.uint16)).save(folder / "5.png")  # 16-bit gray, as depth maps are
    for i in range(6, 9):
        base.save(folder / f"{i}.png")
    clip = read_video(folder)
    assert np.array_equal(clip[0], np.asarray(base))
    assert (clip[1] == 255).all()  # transparent red over white
    assert np.array_equal(clip[2], np.asarray(base.convert("P").convert("RGB")))
    assert (clip[3] == 77).all()
    assert clip[4, :, 26:].min() > 230 and clip[4, :, :22].max() < 25
    assert np.abs(clip[5].astype(int) - 100).max() <= 1


# animations


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".apng", ".png"])
def test_animation_durations_decide_what_is_shown(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    save_animation(path, levels([0, 50, 100, 150, 200]), [100, 300, 200, 100, 200])  # 900 ms
    assert numbers(read_video(path, fps=10), 50) == [0, 1, 1, 1, 2, 2, 3, 4, 4]
    assert numbers(read_video(path), 50) == [0, 1, 1, 1, 2, 2, 3, 4, 4]  # its own rate: the shortest frame's
    assert numbers(read_video(path, fps=20, frames=5), 50) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_no_duration_counts_as_100_ms(tmp_path, suffix):
    path = save_animation(tmp_path / f"clip{suffix}", levels(range(0, 250, 50)), 0)
    assert numbers(read_video(path, fps=20), 50) == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_the_cover_of_an_apng_is_not_a_frame(tmp_path):
    cover, *rest = map(Image.fromarray, levels([250, *range(0, 100, 20)]))
    cover.save(tmp_path / "clip.apng", "PNG", save_all=True, append_images=rest, default_image=True, duration=50)
    assert numbers(read_video(tmp_path / "clip.apng"), 20) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fps", [16, 15, 24, 30, 29.97])
def test_webp_round_trip_keeps_every_frame_and_the_total_time(tmp_path, fps):
    clip = moving_square(17)
    path = write_video(tmp_path / "new" / "clip.webp", clip, fps)
    with Image.open(path) as image:
        total = 0
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            total += image.info["duration"]
    assert total == int(17 * 1000 / fps)
    back = read_video(path, fps=fps)
    assert back.shape == clip.shape and psnr(back, clip) > 30
    assert np.array_equal(back, read_video(path))  # its own rate is the same


def test_webp_at_16_fps_alternates_62_and_63_ms(tmp_path):
    with Image.open(write_video(tmp_path / "clip.webp", moving_square(9), 16)) as image:
        durations = []
        for i in range(9):
            image.seek(i)
            image.load()
            durations.append(image.info["duration"])
    assert durations == [62, 63, 62, 63, 62, 63, 62, 63, 62]


def test_equal_neighbors_survive_the_round_trip(tmp_path):
    values = [0, 0, 0, 60, 60, 120, 180, 180, 180, 180, 180, 60, 0]
    path = write_video(tmp_path / "clip.webp", levels(values), 16)
    with Image.open(path) as image:
        assert image.n_frames < len(values)  # the encoder merged them: it is up to the reader
    for fps in (None, 16):
        assert numbers(read_video(path, fps=fps), 60) == [v // 60 for v in values]


def test_webp_metadata_round_trip(tmp_path):
    wanted = {"prompt": "a 'quoted' \"Bär\"\n熊", "seed": 7, "ai_generated": True}
    with Image.open(write_video(tmp_path / "clip.webp", moving_square(5), 16, wanted)) as image:
        assert json.loads(image.getexif()[0x010E]) == wanted


# videos


def test_mp4_round_trip_keeps_frames_and_colors(tmp_path):
    clip = moving_square(17)
    path = mp4_or_hint(
        tmp_path / "new folder" / "it's a clip.mp4" if shutil.which("ffmpeg") else tmp_path / "a.mp4", clip
    )
    if path:
        back = read_video(path)
        assert back.shape == clip.shape and psnr(back, clip) > 30
        assert np.array_equal(read_video(path, frames=9, fps=16), back[:9])
        assert read_video(path, size=(32, 48)).shape == (17, 32, 48, 3)
        assert b"moov" in path.read_bytes()[:64]  # +faststart: the index comes before the pictures
        assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_mp4_colors_stay_true(tmp_path):
    colors = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 200, 90), (250, 250, 10)], np.uint8)
    clip = np.broadcast_to(colors[:, None, None], (5, 736, 64, 3))  # tall enough for a player to guess HD
    if path := mp4_or_hint(tmp_path / "clip.mp4", clip):
        assert np.abs(read_video(path).astype(int) - clip).max() <= 4


def test_video_is_resampled_by_the_rule_of_nearest_frames(tmp_path):
    if path := mp4_or_hint(tmp_path / "clip.mp4", levels(range(0, 240, 8)), fps=30):
        for fps in (16, 15, 24, 60):
            wanted = nearest_frames([1000 / 30] * 30, fps)
            wanted = wanted[: valid_frames(len(wanted), len(wanted))]
            assert numbers(read_video(path, fps=fps), 8) == wanted.tolist()


def test_mp4_metadata_round_trip(tmp_path):
    wanted = {"prompt": "a 'quoted' \"Bär\"\n熊; = \\", "losses": list(range(2000))}
    if path := mp4_or_hint(tmp_path / "clip.mp4", moving_square(5), metadata=wanted):
        assert json.loads(mp4_comment(path)) == wanted


def mp4_comment(path):
    """The mp4's comment as ffmpeg's metadata dump writes it, unescaped."""
    dump = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", path, "-f", "ffmetadata", "-"], capture_output=True, check=True
    )
    (line,) = [line for line in dump.stdout.decode().splitlines() if line.startswith("comment=")]
    characters, plain = iter(line.removeprefix("comment=")), ""
    for character in characters:
        plain += next(characters) if character == "\\" else character
    return plain


def test_odd_sizes_lose_a_row_and_a_column(tmp_path):
    clip = moving_square(5, 49, 65)
    if path := mp4_or_hint(tmp_path / "clip.mp4", clip):
        assert psnr(read_video(path), clip[:, :48, :64]) > 30


def test_rotation_tag_is_obeyed(tmp_path):
    clip = moving_square(5, 64, 96)
    if path := mp4_or_hint(tmp_path / "clip.mp4", clip):
        data = bytearray(path.read_bytes())
        # The track header's 3x3 matrix, as a phone held upright writes it: show turned by 90 degrees clockwise.
        matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
        start = data.index(b"tkhd") + 44
        data[start : start + 36] = matrix
        path.write_bytes(data)
        assert psnr(read_video(path), np.rot90(clip, -1, (1, 2))) > 30


def test_pixels_become_square(tmp_path):
    if path := mp4_or_hint(tmp_path / "clip.mp4", moving_square(5, 64, 64)):
        wide = tmp_path / "wide.mp4"
        subprocess.run(["ffmpeg", "-v", "error", "-i", path, "-c", "copy", "-aspect", "2:1", wide], check=True)
        assert read_video(wide).shape == (5, 64, 128, 3)


def test_only_what_is_needed_is_read(tmp_path):
    if path := mp4_or_hint(tmp_path / "clip.mp4", moving_square(161, 192, 352)):
        start = read_video(path)[:5]
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 3 // 4])  # whoever reads on runs into the missing end
        assert np.array_equal(read_video(path, frames=5), start)
        with pytest.raises(ValueError, match="ffmpeg failed"):
            read_video(path)


def test_ffmpeg_gets_each_argument_whole():
    """No shell stands between: quotes and spaces in names and metadata arrive as they are."""
    path = Path("/clips/it's a clip.mp4")
    decode = ffmpeg.decode_command(path, 16)
    assert decode[decode.index("-i") + 1] == str(path.absolute()) and decode[-1] == "-"
    assert decode[decode.index("-vf") + 1].startswith("setpts=PTS-STARTPTS,fps=16,scale=")
    before = decode[: decode.index("-i")]  # what holds for this input
    assert before[before.index("-protocol_whitelist") + 1] == "file"
    assert not {"hls", "concat", "sdp", "dash"} & set(before[before.index("-format_whitelist") + 1].split(","))
    assert "setpts=N,fps=25,scale" in " ".join(ffmpeg.decode_command(path, None))  # each picture of the file
    comment = '{"prompt": "a \'quoted\' \\"B\\" ; = "}'
    encode = ffmpeg.encode_command(path, "96x64", 29.97, ["-metadata", f"comment={comment}"], [])
    assert encode[encode.index("-metadata") + 1] == f"comment={comment}"
    assert encode[encode.index("-s") + 1] == "96x64" and encode[encode.index("-framerate") + 1] == "29.97"
    assert encode[-1] == str(path.absolute())


def test_output_path_is_the_one_written(tmp_path, monkeypatch):
    """So that a program can see before a run whether a file is in the way."""
    monkeypatch.setattr(ffmpeg, "is_installed", lambda: True)
    assert output_path(tmp_path / "a.mp4") == tmp_path / "a.mp4"
    monkeypatch.setattr(ffmpeg, "is_installed", lambda: False)
    assert output_path(tmp_path / "a.mp4") == tmp_path / "a.webp"
    for name in ("a.mp4", "b.webp"):
        assert write_video(tmp_path / name, moving_square(5), 16) == output_path(tmp_path / name)


# errors


def test_errors_about_the_request(tmp_path):
    folder = save_folder(tmp_path / "frames", moving_square(15))
    for wanted, request in {
        "got 80: try 81": {"frames": 80},
        "got 1: try 5": {"frames": 1},
        r"multiples of 16, got \(480, 830\)": {"size": (480, 830)},
        r"multiples of 16, got \(0, 16\)": {"size": (0, 16)},
        "fps must be above 0, got 0": {"fps": 0},
    }.items():
        with pytest.raises(ValueError, match=wanted) as error:
            read_video(folder, **request)
        one_line(error)


def test_errors_about_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no clip at .*nowhere.mp4: give a folder of PNG/JPEG") as error:
        read_video(tmp_path / "nowhere.mp4")
    one_line(error)
    with pytest.raises(FileNotFoundError, match="no .png .jpg .jpeg in .*empty: extract") as error:
        read_video(tmp_path / "empty")
    one_line(error)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="notes.txt is no clip: give a folder") as error:
        read_video(tmp_path / "notes.txt")
    one_line(error)


def test_a_clip_needs_motion(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "still.jpg")
    Image.new("RGB", (32, 32)).save(tmp_path / "still.png")
    four = save_folder(tmp_path / "four", moving_square(4))
    for path, count in {tmp_path / "still.jpg": 1, tmp_path / "still.png": 1, four: 4}.items():
        with pytest.raises(ValueError, match=f"has {count} frames.*at least 5: motion needs a longer clip") as error:
            read_video(path, fps=60)
        one_line(error)


def test_frames_of_two_sizes_are_named(tmp_path):
    folder = save_folder(tmp_path / "frames", moving_square(12))
    Image.new("RGB", (96, 80)).save(folder / "frame9.png")
    with pytest.raises(ValueError, match=r"frame0.png has .* = \(96, 64\), frame9.png has \(96, 80\)") as error:
        read_video(folder)
    one_line(error)
    assert len(read_video(folder, frames=9)) == 9  # what is not needed is not looked at


def test_frames_below_16_pixels_need_a_size(tmp_path):
    folder = save_folder(tmp_path / "frames", moving_square(5)[:, :12])
    with pytest.raises(ValueError, match="at least 16x16 pixels, got 96x12: pass a size"):
        read_video(folder)
    assert read_video(folder, size=(16, 16)).shape == (5, 16, 16, 3)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_truncated_animation_names_the_file(tmp_path, suffix):
    path = save_animation(tmp_path / f"clip{suffix}", moving_square(5), 100)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot read .*clip.*damaged") as error:
        read_video(path)
    one_line(error)


def test_broken_picture_in_a_folder_is_named(tmp_path):
    folder = save_folder(tmp_path / "frames", moving_square(5), "{}.jpg")
    for broken in (b"text", (folder / "3.jpg").read_bytes()[:500]):
        (folder / "3.jpg").write_bytes(broken)
        with pytest.raises(ValueError, match="cannot read .*3.jpg.*damaged") as error:
            read_video(folder)
        one_line(error)


def test_text_and_damaged_videos_are_refused(tmp_path):
    path = mp4_or_hint(tmp_path / "clip.mp4", moving_square(17))
    if path is None:
        return
    whole = path.read_bytes()
    for broken in (b"hello world\n" * 100, whole[:1000], whole[: len(whole) * 3 // 4]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="ffmpeg failed.*ffmpeg -v error.*clip.mp4") as error:
            read_video(path)
        one_line(error)


def test_a_short_clip_gives_what_it_has(tmp_path):
    assert len(read_video(save_folder(tmp_path / "frames", moving_square(15)), frames=81)) == 13
    if path := mp4_or_hint(tmp_path / "clip.mp4", moving_square(15)):
        assert len(read_video(path, frames=81, fps=16)) == 13
        with pytest.raises(ValueError, match="has 4 frames at 4 fps, needs at least 5") as error:
            read_video(path, frames=81, fps=4)
        one_line(error)


def test_without_ffmpeg_videos_are_refused_and_webp_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert mp4_or_hint(tmp_path / "video.mp4", moving_square(5)) is None
    path = write_video(tmp_path / "clip.mp4", moving_square(5), 16)
    assert path == tmp_path / "clip.webp" and read_video(path).shape == (5, 64, 96, 3)
    printed = capsys.readouterr().out
    assert (
        printed.count("\n") == 1
        and "no ffmpeg on PATH" in printed
        and str(path) in printed
        and "apt install ffmpeg" in printed
    )
    assert not (tmp_path / "clip.mp4").exists()


def test_an_ffmpeg_that_fails_is_quoted_and_the_clip_becomes_a_webp(tmp_path, monkeypatch, capsys):
    """One without libx264, for instance. What was there is left alone."""

    def fails(command, **_):
        Path(command[-1]).write_bytes(b"half a video")
        return subprocess.CompletedProcess(command, 1, b"", b"Unknown encoder 'libx264'\nConversion failed!\n")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", fails)
    (tmp_path / "clip.mp4").write_bytes(b"an older video")
    path = write_video(tmp_path / "clip.mp4", moving_square(5), 16, {"seed": 3})
    said = capsys.readouterr().out
    assert re.search("Unknown encoder 'libx264'.*ffmpeg -v error .*-s 96x64 .*clip.*part.mp4", said)
    assert said.startswith(f"note: the clip goes to {path} instead, because ffmpeg failed") and said.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "clip.webp"]
    assert (tmp_path / "clip.mp4").read_bytes() == b"an older video"
    with Image.open(path) as image:
        assert json.loads(image.getexif()[0x010E]) == {"seed": 3}


def test_a_long_prompt_is_no_argument(tmp_path, monkeypatch):
    """Linux passes on 131,071 bytes: what is longer goes through a file, whose signs are escaped."""
    seen = []

    def encodes(command, **_):
        seen.append(command)
        at = command.index("-map_metadata")
        assert command[at + 1] == "1" and command.count("-i") == 2
        seen.append(Path(command[command.index("ffmetadata") + 2]).read_text("utf-8"))
        Path(command[-1]).write_bytes(b"a video")
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", encodes)
    prompt = "\u6e05" * 30_000 + ' = ; # \\ "\n'
    assert write_video(tmp_path / "clip.mp4", moving_square(5), 16, {"prompt": prompt}).suffix == ".mp4"
    command, text = seen
    assert max(len(word) for word in command) < 131_072 and not any(word.startswith("comment=") for word in command)
    first, comment = text.rstrip("\n").split("\n")
    assert first == ";FFMETADATA1" and comment.startswith("comment=")
    unescaped = re.sub(r"\\(.)", r"\1", comment.removeprefix("comment="))
    assert json.loads(unescaped) == {"prompt": prompt}
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_bad_frames_and_names_are_refused(tmp_path):
    for frames in (np.zeros((5, 16, 16, 3)), np.zeros((5, 3, 16, 16), np.uint8), np.zeros((0, 16, 16, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"frames must be \(T, H, W, 3\) uint8.*got"):
            write_video(tmp_path / "clip.webp", frames, 16)
    with pytest.raises(ValueError, match="fps above 0, got .* 0"):
        write_video(tmp_path / "clip.webp", moving_square(5), 0)
    with pytest.raises(ValueError, match="ends in .mp4 or .webp, got clip.gif"):
        write_video(tmp_path / "clip.gif", moving_square(5), 16)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webp"])
def test_unwritable_folder_is_named(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write into .*file.*choose another folder") as error:
        write_video(tmp_path / "file" / name, moving_square(5), 16)
    one_line(error)
