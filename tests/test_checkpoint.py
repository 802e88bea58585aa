"""The shipped checkpoint: it is what its README says, small enough to ship, and good enough to use."""

import re

import numpy as np
import torch

from wan_mini.load import load_vae
from wan_mini.runtime import digest
from wan_mini.tiny import demo
from wan_mini.tiny.train import to_videos
from wan_mini.tiny.world import KINDS, make_clip
from wan_mini.video import from_model


def test_the_hashes_are_those_of_the_files():
    text = (demo.CHECKPOINT / "README.md").read_text("utf-8")
    named = re.findall(r"^\| (\S+) \| (\d+) \| `(\w{64})` \|$", text, re.M)
    files = {path.relative_to(demo.CHECKPOINT).as_posix(): path for path in demo.CHECKPOINT.rglob("*.*")}
    assert {name for name, _, _ in named} == {name for name, path in files.items() if path.is_file()} - {"README.md"}
    for name, size, sha256 in named:
        assert files[name].stat().st_size == int(size) and digest(files[name]) == sha256
    assert sum(int(size) for _, size, _ in named) <= 16e6


def test_the_vae_restores_held_out_clips():
    """One clip of each kind, 17 frames; a limit a little below what the worst of them gave."""
    vae = load_vae(demo.CHECKPOINT, device="cpu", dtype=torch.float32)
    for seed, kind in enumerate(KINDS):
        clip = make_clip(seed, kind, "held-out", range(17)).frames
        with torch.no_grad():
            restored = from_model(vae.decode(vae.encode(to_videos(clip[None], torch.device("cpu")))))
        error = np.square(restored / 255.0 - clip / 255.0).mean()
        assert -10 * np.log10(error) > 27.5, kind
