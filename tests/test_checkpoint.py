"""The shipped checkpoint: it is what its README says, small enough to ship, and good enough to use."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvmt
from benchmarks import evaluate
from wan_mini.hashes import sha256_file
from wan_mini.load import load_vae
from wan_mini.runs.request import load_preset
from wan_mini.tiny import demo
from wan_mini.tiny.world import FPS, FRAMES, HEIGHT, KINDS, WIDTH, make_clip
from wan_mini.video import to_tensor, to_uint8

ROOT = Path(__file__).parent.parent


def test_the_hashes_are_those_of_the_files():
    text = (demo.CHECKPOINT / "README.md").read_text("utf-8")
    named = re.findall(r"^\| (\S+) \| (\d+) \| `(\w{64})` \|$", text, re.M)
    files = {path.relative_to(demo.CHECKPOINT).as_posix(): path for path in demo.CHECKPOINT.rglob("*.*")}
    assert {name for name, _, _ in named} == {name for name, path in files.items() if path.is_file()} - {"README.md"}
    for name, size, sha256 in named:
        assert files[name].stat().st_size == int(size) and sha256_file(files[name]) == sha256
    assert sum(int(size) for _, size, _ in named) <= 16e6


def test_the_preset_fits_the_world():
    """Clips as the world makes them; and motion.json stores no value that is the default anyway."""
    clip, motion = load_preset(demo.CHECKPOINT, fastvmt.MotionConfig())
    assert (clip.height, clip.width, clip.frames, clip.fps) == (HEIGHT, WIDTH, FRAMES, FPS)
    stored = json.loads((demo.CHECKPOINT / "motion.json").read_text("utf-8"))["motion"]
    for name, value in stored.items():
        value = tuple(value) if isinstance(value, list) else value
        assert getattr(motion, name) == value != getattr(fastvmt.MotionConfig(), name), name


def test_the_vae_restores_held_out_clips():
    """One clip of each kind, 17 frames; a limit a little below what the worst of them gave."""
    vae = load_vae(demo.CHECKPOINT, device="cpu", dtype=torch.float32)
    for seed, kind in enumerate(KINDS):
        clip = make_clip(seed, kind, "held-out", range(17)).frames
        with torch.no_grad():
            restored = to_uint8(vae.decode(vae.encode(to_tensor(clip))))
        error = np.square(restored / 255.0 - clip / 255.0).mean()
        assert -10 * np.log10(error) > 27.5, kind


@pytest.mark.slow
def test_motion_transfer_gives_the_stored_figures(tmp_path):
    """The first four clips of benchmarks/results/evaluation.csv, one of each kind, with their prompts, once more.

    Another processor adds in another order, and 200 updates of a latent magnify that; so the limits are wide enough
    for clips to differ, and too narrow for a transfer that does not follow.
    """
    now = tmp_path / "now.csv"
    flags = "--clips 4 --methods fastvmt --classifier-clips 4 --device cpu --dtype float32"
    evaluate.program([*flags.split(), "--csv", str(now)])
    stored, again = (
        {row["clip"]: row for row in csv.DictReader(path.open(encoding="utf-8")) if row["method"] == "fastvmt"}
        for path in (ROOT / "benchmarks/results/evaluation.csv", now)
    )
    assert len(again) == 4 and again.keys() <= stored.keys()
    for name, limit in {"correlation": 0.1, "error_px": 4.0, "color_ok": 0.26, "gradients": 0.0}.items():
        means = [np.mean([float(rows[clip][name]) for clip in again]) for rows in (stored, again)]
        assert abs(means[0] - means[1]) <= limit, (name, means)
