"""What every generated file says of itself, and the visible label."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fastvmt import main
from wan_mini import generate
from wan_mini.errors import UserError
from wan_mini.generate import program as generate_program
from wan_mini.runs import program
from wan_mini.runs.cli import run
from wan_mini.runs.label import with_label
from wan_mini.runs.provenance import GENERATED
from wan_mini.tiny.world import make_clip
from wan_mini.video import write_video

TERM = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
SMALL = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "1", "--device", "cpu"]


def metadata(path) -> str:
    """All that a file says, in any of its places."""
    if path.suffix == ".json":
        return path.read_text(encoding="utf-8")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return str(file.metadata())
    if path.suffix in (".webp", ".png"):
        with Image.open(path) as file:
            file.load()
            texts = [
                str(file.info.get("xmp", b"") or file.info.get("XML:com.adobe.xmp", "")),
                str(dict(file.getexif())),
            ]
            return "\n".join([*texts, str(file.info.get("Description", ""))])
    return path.read_bytes().decode("latin1")


def test_every_file_of_a_run_is_marked(folder, tmp_path):
    ref = write_video(tmp_path / "ref.webp", make_clip(0).frames[:9, ::2, ::2], fps=16)
    words = ["--model", str(folder), "--ref", str(ref), "--prompt", "a ball", "--png", "--out", str(tmp_path / "run")]
    assert main([*words, "--amf", "none", *SMALL]) == 0
    files = sorted(path for path in (tmp_path / "run").iterdir() if path.suffix != ".html")
    assert {path.suffix for path in files} >= {".json", ".safetensors", ".webp", ".png"}
    for path in files:
        assert TERM in metadata(path) and "ai_generated" in metadata(path), path
    for name in ("preview.webp", "frame0000.png"):
        with Image.open(tmp_path / "run" / name) as file:
            file.load()
            packet = file.info.get("xmp", b"").decode() or file.info["XML:com.adobe.xmp"]
        assert re.search(rf'Iptc4xmpExt:DigitalSourceType="{TERM}"', packet)
    with safe_open(tmp_path / "run/latents.safetensors", "pt") as file:
        assert json.loads(file.metadata()["settings"]).items() >= GENERATED.items()


def test_generate_marks_what_it_writes_and_what_it_decodes(folder, tmp_path):
    out = tmp_path / "a.webp"
    argv = ["--model", str(folder), "--prompt", "a ball", "--out", str(out), *SMALL]
    assert run(generate_program, argv) == 0
    argv = ["--model", str(folder), "--decode", str(out.with_suffix(".safetensors")), "--out", str(tmp_path / "b.webp")]
    assert run(generate_program, [*argv, "--device", "cpu"]) == 0
    for path in (out, out.with_suffix(".safetensors"), tmp_path / "b.webp"):
        assert TERM in metadata(path) and "ai_generated" in metadata(path), path


def test_a_clip_that_was_not_generated_is_not_marked(tmp_path):
    assert TERM not in metadata(write_video(tmp_path / "a.webp", make_clip(0).frames[:5], 16, {"by": "hand"}))


def test_the_label_is_in_its_corner():
    frames = torch.randint(1, 255, (3, 96, 128, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    before = frames.copy()
    labeled = with_label(frames, "AI-generated")
    assert np.array_equal(frames, before) and labeled.shape == frames.shape
    changed = (labeled != frames).any(axis=(0, 3))
    rows, columns = np.nonzero(changed)
    assert rows.min() > 70 and rows.max() == 95 and columns.min() == 0 and columns.max() < 100
    box = labeled[:, rows.min() :, : columns.max() + 1]
    assert (box == 0).mean() > 0.3 and box.max() > 200
    assert np.array_equal(box[0], box[2])
    assert with_label(frames, "") is frames
    with pytest.raises(UserError, match=r"--label needs a text that fits into 128x96 pixels, got 'w"):
        with_label(frames, "w" * 100)


def test_a_label_that_does_not_fit_is_refused_before_a_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr(program, "load_wan", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr(generate, "load_wan", lambda *_, **__: pytest.fail("weights were loaded"))
    wide = ["--label", "w" * 200]
    assert main([*wide, "--device", "cpu"]) == 2
    assert "--label needs a text that fits into 192x128 pixels" in capsys.readouterr().err
    command = ["--model", str(folder), "--prompt", "a cat", "--out", "x.webp", "--device", "cpu"]
    assert run(generate.program, [*command, *wide]) == 2
    assert "--label needs a text that fits into 832x480 pixels" in capsys.readouterr().err
