"""Plain text-to-video, and the pieces both programs share."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from wan_mini import generate
from wan_mini.device.timing import StageTimer
from wan_mini.errors import UserError
from wan_mini.generate import program
from wan_mini.pipeline import guided_velocity
from wan_mini.prompts import NEGATIVE, encode_prompts
from wan_mini.runs.cli import run
from wan_mini.runs.folder import load_tensors
from wan_mini.video import read_video

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("sampler", "flags", "own"),
    [
        ("unipc", [], {"shift": 8.0, "cfg": 6.0, "negative": NEGATIVE}),
        ("euler", ["--compile", "--negative", "", "--cfg", "2"], {"shift": 8.0, "cfg": 2.0, "negative": ""}),
    ],
)
def test_from_prompt_to_file(folder, tmp_path, capsys, monkeypatch, sampler, flags, own):
    out, compiled = tmp_path / "clip.webp", []
    monkeypatch.setattr(generate, "compile_blocks", compiled.append)
    command = [
        "--model",
        str(folder),
        "--prompt",
        "a cat",
        "--height",
        "70",
        "--width",
        "96",
        "--frames",
        "8",
        "--steps",
        "2",
    ]
    command += flags
    assert (
        run(program, [*command, "--sampler", sampler, "--device", "cpu", "--dtype", "float32", "--out", str(out)]) == 0
    )
    assert read_video(out).shape == (9, 64, 96, 3)
    assert len(compiled) == flags.count("--compile")
    tensors, settings = load_tensors(tmp_path / "clip.safetensors")
    latents = tensors["latents"]
    assert latents.shape == (1, 16, 3, 8, 12) and own.items() <= settings.items()
    again = ["--model", str(folder), "--decode", str(tmp_path / "clip.safetensors"), "--out", str(tmp_path / "2.webp")]
    again += ["--device", "cpu"]
    assert run(program, again) == 0
    assert np.array_equal(read_video(tmp_path / "2.webp"), read_video(out))
    said = capsys.readouterr().out
    assert "8 frames of 96x70 become 9 of 96x64" in said and "wrote" in said


def test_errors_are_one_line(folder, tmp_path, capsys):
    assert run(program, ["--model", str(tmp_path / "none"), "--prompt", "a"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    (tmp_path / "there.mp4").touch()
    for flags in (
        ["--height", "0"],
        ["--frames", "-9"],
        ["--out", "x.gif"],
        ["--out", str(tmp_path / "there.mp4")],
        [],
    ):
        assert run(program, ["--model", str(folder), *flags, *["--prompt", "a"][: 2 * len(flags)]]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        run(program, ["--prompt", "a"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_guidance_is_the_line_through_two_velocities():
    def dit(x, timestep, text):
        return text * timestep.reshape(1)

    t = torch.tensor(2.0)
    assert guided_velocity(dit, None, t, torch.tensor(5.0), torch.tensor(3.0), 6.0) == 6 + 6 * (10 - 6)
    assert guided_velocity(dit, None, t, torch.tensor(5.0), None, 1.0) == 10


def test_prompts_are_cleaned_cut_and_never_padded(wan, capsys):
    short, spaced, empty, long = encode_prompts(wan, ["a cat", "  a \n cat ", "", "x" * 100], CPU)
    assert short.shape == (1, 7, 16) and torch.equal(short, spaced)  # one token a character here, and </s>
    assert empty.shape[1] == 1
    assert long.shape[1] == wan.dit.config.text_len == 64
    assert "the prompt has 102 tokens, the model reads 64" in capsys.readouterr().out
    tail = encode_prompts(wan, ["x" * 62], CPU)[0]  # what is cut off is the end of the prompt, not </s>
    torch.testing.assert_close(long, tail)


def test_the_negative_prompt_is_the_originals():
    assert len(NEGATIVE) == 137 and NEGATIVE.count("，") == 27


def test_stages_add_up():
    stage = StageTimer(CPU)
    for _ in range(2):
        with stage("nap"):
            time.sleep(0.05)
    with stage("other"):
        pass
    assert set(stage.table) == {"nap", "other"}
    assert 0.1 <= stage.table["nap"]["seconds"] < 5 > stage.table["other"]["seconds"]
    assert json.dumps(stage.table) and (stage.table["nap"]["peak_gb"] is None or stage.table["nap"]["peak_gb"] > 0.05)


@pytest.mark.parametrize(
    ("problem", "code", "words"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (FileNotFoundError("no file"), 2, "error: no file\n"),
        (torch.OutOfMemoryError("much. More."), 2, "error: out of memory, try --offload or a smaller clip (much)\n"),
        (
            RuntimeError("can't allocate memory: you tried"),
            2,
            "error: out of memory, try --offload or a smaller clip (can't allocate memory: you tried)\n",
        ),
        (
            MemoryError("Unable to allocate 7 GiB"),
            2,
            "error: out of memory, try --offload or a smaller clip (Unable to",
        ),
        (
            RuntimeError("could not create a primitive"),
            2,
            "error: out of memory, try --offload or a smaller clip (could",
        ),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_exit_codes(problem, code, words, capsys):
    def main(argv):
        raise problem

    assert run(main) == code
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count("\n") == 1


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(lambda argv: 1 / 0)
    with pytest.raises(RuntimeError, match="size"):
        run(lambda argv: torch.ones(2) @ torch.ones(3))


def test_latents_decode_beside_themselves(folder, tmp_path):
    """As after a run that failed to decode: the same --out, the latents there, the video not."""
    flags = [
        "--model",
        str(folder),
        "--height",
        "64",
        "--width",
        "96",
        "--frames",
        "5",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    out = tmp_path / "clip.webp"
    for dtype in ("float32", "bfloat16"):
        assert run(program, [*flags, "--prompt", "a cat", "--out", str(out), "--dtype", dtype]) == 0
        frames = read_video(out)
        out.unlink()
        out.with_suffix(".html").unlink()
        again = ["--model", str(folder), "--decode", str(out.with_suffix(".safetensors")), "--out", str(out)]
        assert run(program, [*again, "--device", "cpu"]) == 0
        assert np.array_equal(read_video(out), frames)  # in the dtype of the run
        for suffix in (".webp", ".html", ".safetensors"):
            out.with_suffix(suffix).unlink()


def test_a_bug_shows_where_it_is():
    """A ValueError that is no UserError is a bug."""
    with pytest.raises(ValueError, match="bug"):
        run(lambda argv: (_ for _ in ()).throw(ValueError("bug")))


def test_what_was_said_first_comes_first_in_a_file(tmp_path):
    """A program's output in a file is buffered, its errors are not."""
    words = 'raise UserError("mend me")'
    code = "from wan_mini.errors import UserError\nfrom wan_mini.runs.cli import run\ndef main(_):\n    print('note')\n"
    command = [sys.executable, "-c", f"{code}    {words}\nrun(main, [])"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=log, env=environment | {"PYTHONPATH": str(ROOT)}, check=False)
    assert (tmp_path / "log").read_text().split("\n") == ["note", "error: mend me", ""]


def test_the_traceback_is_shown_on_request(capsys):
    def main(argv):
        raise UserError("mend me")

    assert run(main, ["--traceback"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("error: mend me\n")


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".safetensors"])
def test_nothing_is_overwritten(folder, tmp_path, capsys, suffix):
    """Without ffmpeg a result becomes .webp, and latents lie beside it: neither may be there."""
    (tmp_path / f"clip{suffix}").write_bytes(b"old")
    out = str(tmp_path / "clip.mp4")
    assert run(program, ["--model", str(folder), "--prompt", "a cat", "--out", out, "--device", "cpu"]) == 2
    assert f"clip{suffix} exists already: choose another --out" in capsys.readouterr().err
    assert (tmp_path / f"clip{suffix}").read_bytes() == b"old"


@pytest.mark.parametrize("flags", [["--seed", "1"], ["--frames", "5"], ["--offload"], ["--dtype", "float32"]])
def test_decode_refuses_what_it_does_not_use(folder, tmp_path, capsys, flags):
    command = ["--model", str(folder), "--decode", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "x.webp")]
    assert run(program, [*command, *flags]) == 2
    assert f"--decode does not use {flags[0]}: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["/proc/x.webp", "/dev/null/x.webp"])
def test_an_unwritable_place_is_found_before_the_model_is_loaded(folder, capsys, monkeypatch, out):
    monkeypatch.setattr(generate, "load_wan", lambda *_, **__: pytest.fail("weights were loaded"))
    assert run(program, ["--model", str(folder), "--prompt", "a cat", "--out", out, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "choose another --out" in said
    assert run(program, ["--model", str(folder), "--prompt", "a", "--out", "x.webp", "--vae-tile", "33"]) == 2
    assert "vae_tile must be a positive multiple of 32 pixels or none, got 33" in capsys.readouterr().err


def test_a_run_that_stops_keeps_its_latents_and_says_where(folder, tmp_path, capsys, monkeypatch):
    small = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "1", "--device", "cpu"]
    out = tmp_path / "clip.webp"
    with monkeypatch.context() as patch:
        patch.setattr(generate, "decode", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no memory")))
        assert run(program, ["--model", str(folder), "--prompt", "a", *small, "--out", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: out of memory") and f"--decode {tmp_path}/clip.safetensors" in said
    assert [path.name for path in tmp_path.iterdir()] == ["clip.safetensors"]
    latents = str(tmp_path / "clip.safetensors")
    assert run(program, ["--model", str(folder), "--decode", latents, "--out", str(out), "--device", "cpu"]) == 0
    monkeypatch.setattr(generate, "load_wan", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    empty = tmp_path / "empty" / "clip.webp"
    assert run(program, ["--model", str(folder), "--prompt", "a", *small, "--out", str(empty)]) == 130
    assert not list(empty.parent.iterdir())  # nor is the name taken
