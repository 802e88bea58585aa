"""Numbers that cannot run and names that a terminal would obey: refused at once, printed as escapes."""

import io
import os
import re
import sys
import time

import pytest
from PIL import Image

import fastvmt
from wan_mini import generate, inspect
from wan_mini.config import ClipConfig
from wan_mini.errors import UserError, printable
from wan_mini.load import build_preset
from wan_mini.prompts import clean_prompt
from wan_mini.runs.cli import run

NUMBERS = {
    "--height 1600000": "height must be at most 8192, got 1600000",
    "--width 999999999999999999999": "width must be at most 8192",
    "--frames 1000000001": "frames must be at most 1.04858e.06|frames must be at most",
    "--height 8192 --width 8192 --frames 81": "81 frames of 8192x8192 make 5505024 tokens, more than any device holds",
    "--set tile=1000000000,4": "tile must be at most 256",
    "--steps 1000000000": "steps must be at most 10000",
    "--set optim_steps=100000000": "optim_steps must be at most 10000",
    "--set fps=1e9": "fps must be at most 1000",
    "--set fps=1e308": "fps must be at most 1000",
    "--set fps=nan": "fps must be at least 0 and finite, got nan",
    "--seed 18446744073709551616": "argument --seed: needs a seed from",
    "--seed -9223372036854775809": "argument --seed: needs a seed from",
    f"--seed 1{'0' * 400}": "argument --seed: needs a seed from",
    "--set steps=3 steps=9": "steps given twice by --set: keep one",
    f"--set cfg=1{'0' * 400}": "--set cfg needs a value|cfg must be at least 0 and finite",
}


@pytest.fixture(scope="module")
def _warm():
    """What torch imports for the first module on the meta device."""
    build_preset("tiny")


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("flags", NUMBERS)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_numbers_that_cannot_run_are_refused_at_once(flags, dry, tmp_path, capsys):
    start = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        try:
            code = fastvmt.main([*flags.split(), "--device", "cpu", *dry])
        except SystemExit as stop:
            code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert re.search(NUMBERS[flags], error)
    assert time.process_time() - start < 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--cfg", "nan"], ["--shift", "nan"], ["--steps", "100000"], ["--seed", "1" * 30]])
def test_generation_refuses_its_numbers_before_it_writes(flags, folder, tmp_path, capsys):
    command = ["--model", str(folder), "--prompt", "a", "--out", str(tmp_path / "a.webp"), "--device", "cpu", *flags]
    try:
        code = run(generate.program, [*command, "--height", "64", "--width", "64", "--frames", "5"])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and flags[0].strip("-") in error and not list(tmp_path.iterdir())


def test_sizes_that_people_use_are_no_trouble():
    for height, width, frames in ((480, 832, 81), (720, 1280, 121), (1088, 1920, 81), (16, 8192, 5)):
        assert ClipConfig(height, width, frames).width == width


HOSTILE = "ok\x1b[31mred\x1b]0;title\x07\r\x9b2J\u202e"
SHOWN = r"ok\x1b[31mred\x1b]0;title\x07\r\x9b2J\u202e"


def test_control_characters_are_shown_as_escapes():
    assert printable(HOSTILE) == SHOWN
    assert printable("a\nb\tc\udce9", keep="\n") == "a\nb\\tc\\udce9"
    assert printable("Bär 熊 ▁ é ½") == "Bär 熊 ▁ é ½"
    assert str(UserError(f"no clip at {HOSTILE}\nhere")) == f"no clip at {SHOWN} here"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_nothing_raw_reaches_a_terminal(encoding, monkeypatch):
    """By no stream, whoever prints: notes, errors, and what a terminal's encoding lacks."""
    streams = {}
    for name in ("stdout", "stderr"):
        streams[name] = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, name, streams[name])

    def main(argv):
        print(HOSTILE, "熊")
        raise FileNotFoundError(f"no {HOSTILE}")

    assert run(main) == 2
    for stream in streams.values():
        stream.flush()
        assert not set(stream.buffer.getvalue()) & set(b"\x1b\x07\x9b")
    assert b"\\x1b[31mred" in streams["stdout"].buffer.getvalue()


@pytest.mark.skipif(os.name != "posix", reason="no other system allows such names of files")
def test_names_of_clips_and_models_are_printed_plainly(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = [Image.new("L", (64, 64), 9 * i) for i in range(12)]
    clip = tmp_path / "ok\x1b[31mred\x1b]0;t\x07.gif"
    pictures[0].save(clip, save_all=True, append_images=pictures[1:], duration=63)
    size = ["--height", "64", "--width", "64", "--steps", "1", "--device", "cpu", "--dtype", "float32"]
    flags = ["--ref", str(clip), "--prompt", f"a\x1b[31m{HOSTILE}", "--set", "optim_steps=1", "--out", "run"]
    assert fastvmt.main(["--model", str(folder), *size, *flags, "--frames", "17"]) == 0
    assert fastvmt.main(["--model", "m\x1b[2J", "--ref", "x\x1b[2J.gif", "--prompt", "a"]) == 2
    (tmp_path / "m\x1b[2J").mkdir()
    assert inspect.main([str(tmp_path / "m\x1b[2J")]) == 1
    printed = capsys.readouterr()
    assert not set(printed.out + printed.err) & set("\x1b\x07")
    assert "red" in printed.out and r"m\x1b[2J" in printed.err + printed.out


@pytest.mark.parametrize("out", ["", "a\x1bb", "a\nb", "a\u202eb"])
def test_no_control_character_becomes_a_path(out, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program, argv in (
        (fastvmt.main, ["--out", out, "--dry-run"]),
        (generate.program, ["--model", "m", "--prompt", "a", "--out", out]),
    ):
        with pytest.raises(SystemExit) as stop:
            program(argv)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "argument --out: needs a path" in error and error.count("\n") == 1 and "\x1b" not in error
    with pytest.raises(SystemExit):
        fastvmt.main(["--ref", "", "--prompt", "a"])
    assert "argument --ref: needs a path, got an empty text" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_nested_entity_takes_one_pass_and_a_book_is_refused():
    start = time.process_time()
    assert clean_prompt("a &" + "amp;" * 20_000 + "lt; b") == "a < b"
    assert clean_prompt("&amp;amp;quot;") == '"' and clean_prompt("&amp; &amp;amp;") == "& &"
    assert time.process_time() - start < 1
    with pytest.raises(UserError, match="a prompt may have 100000 characters, got 100001"):
        clean_prompt("a" * 100_001)
