"""Write a tiny Wan with random weights, so that the whole pipeline runs where no checkpoint is: its videos are noise.

python -m wan_mini.tiny.untrained FOLDER
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from wan_mini.config import TINY, TINY_UMT5, TINY_VAE, DiTConfig, UMT5Config, VAEConfig
from wan_mini.dit import WanDiT
from wan_mini.load import save_wan
from wan_mini.tiny import demo
from wan_mini.tiny.grammar import CHARACTERS, tokenizer_json
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE


def write_untrained(
    folder: str | Path, dit: DiTConfig = TINY, vae: VAEConfig = TINY_VAE, text: UMT5Config = TINY_UMT5, seed: int = 0
) -> None:
    """Write the checkpoint folder, official layout; the same seed gives the same bytes."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(seed)
        tokenizer = Path(scratch, "tokenizer.json")
        tokenizer.write_text(json.dumps(tokenizer_json(dict.fromkeys(CHARACTERS, -1.0))), encoding="utf-8")
        save_wan(folder, WanDiT(dit), WanVAE(vae), UMT5Encoder(text), tokenizer)


def untrained_checkpoint() -> tuple[Path, Path]:
    """The random model, made beside this file when first needed, and the bundled clip -> (folder, clip)."""
    folder = Path(__file__).parent / "untrained"
    if not (folder / "config.json").exists():
        write_untrained(folder)
    return folder, demo.REFERENCE


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m wan_mini.tiny.untrained FOLDER")
    write_untrained(sys.argv[1])
