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
from wan_mini.tiny.world import FPS, make_clip
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE
from wan_mini.video import write_video

SPECIAL = ("<pad>", "</s>", "<unk>")  # numbers 0, 1, 2 as in UMT5
CHARACTERS = ("▁", *map(chr, range(33, 127)))  # printable ASCII; the mark is a space


def tokenizer_json(scores: dict[str, float]) -> dict:
    """A unigram tokenizer of these pieces and scores, in the format of the official tokenizer.json."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token, **flags} for number, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [*([token, -0.0] for token in SPECIAL), *scores.items()]},
    }


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
    """The random model and a held-out clip of the world, made beside this file when first needed -> (folder, clip)."""
    folder = Path(__file__).parent / "untrained"
    clip = folder / "reference.webp"
    if not clip.exists():
        write_untrained(folder)
        write_video(clip, make_clip(3, kind="single", split="held-out").frames, FPS)
    return folder, clip


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m wan_mini.tiny.untrained FOLDER")
    write_untrained(sys.argv[1])
