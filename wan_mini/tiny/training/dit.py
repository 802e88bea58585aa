"""Stage dit: the transformer, trained by flow matching on the VAE's latents.

As for Wan 2.1, the text encoder is frozen. This one is random, but each head looks at one neighbor of a word. So
its vectors tell words apart, and the vector of a color tells whose color it is. Trained together with the transformer,
it would make the words for shapes alike before the transformer has learned what they mean.
"""

import json
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn

from wan_mini.config import TINY, TINY_UMT5, DiTConfig, UMT5Config
from wan_mini.device.select import pick_dtype
from wan_mini.dit import WanDiT
from wan_mini.errors import MissingFile
from wan_mini.load import Wan, load_vae, save_wan
from wan_mini.scheduler import shift_sigma
from wan_mini.tiny.training import fast_dit, fast_vae
from wan_mini.tiny.training.data import Encoder, Pool, Sampler, workers
from wan_mini.tiny.training.grammar import casual, grammar_tokenizer
from wan_mini.tiny.training.matching import matching_loss
from wan_mini.tiny.training.probe import Probe, text_of
from wan_mini.tiny.training.recipe import BLOCK, DIT, EMPTY, NEIGHBOR_BIAS, NEIGHBORS, SHIFT, TAU, Batch, Recipe
from wan_mini.tiny.training.record import record
from wan_mini.tiny.training.trainer import Figures, Items, Job, Trainer
from wan_mini.tiny.training.vae import VAE_FILE, normal, to_videos
from wan_mini.tiny.world import make_clip
from wan_mini.tokenizer import Tokenizer
from wan_mini.umt5 import Block, UMT5Encoder
from wan_mini.vae import WanVAE


@dataclass(frozen=True)
class Example:
    """What the flow-matching loss of one batch is made of."""

    clean: Tensor  # (B,16,F,h,w)
    noise: Tensor  # (B,16,F,h,w)
    sigma: Tensor  # (B,) in [0,1]
    text: Tensor  # (B,L,C) vectors of the prompts, 0 for padding
    positions: Tensor | None = None  # (n,F,S,F,2), true, of the first n clips, for the matching loss


def sample_sigma(rng: Generator, batch: int, shift: float = SHIFT) -> Tensor:
    """(B,) noise levels in [0,1], shifted as the sampler's; evenly spaced before, which makes the loss less noisy.

    Source of the spacing: Kingma et al., Variational Diffusion Models (arXiv 2107.00630), appendix I.
    """
    u = (rng.random() + np.arange(batch) / batch) % 1
    return shift_sigma(torch.from_numpy(u), shift).float()


def flow_loss(dit: WanDiT, example: Example, dtype: torch.dtype, weight: float = 0.0) -> tuple[Tensor, Figures]:
    """Squared error of the velocity noise - clean, plus `weight` times the matching loss of one block.

    Returns the loss and its parts. Source: rectified flow (arXiv 2209.03003); Wan technical report (arXiv 2503.20314),
    section 4.2.
    """
    clean = example.clean
    level = example.sigma.to(clean.device)[:, None, None, None, None]  # (B,) -> (B,1,1,1,1)
    noisy = (1 - level) * clean + level * example.noise
    run = partial(fast_dit.velocity, dit, noisy, 1000 * example.sigma, example.text, dtype)
    target = example.noise - clean
    if example.positions is None or weight == 0:
        velocity, _ = run()
        loss = (velocity - target).square().mean()
        return loss, {"flow": float(loss.detach())}
    velocity, qk = run(qk_block=BLOCK, qk_clips=len(example.positions))
    flow = (velocity - target).square().mean()
    matching = matching_loss(qk[0], qk[1], example.positions, dit.grid(clean), TAU)
    return flow + weight * matching, {"flow": float(flow.detach()), "matching": float(matching.detach())}


@dataclass(frozen=True)
class MakeEncoder:
    """Calling it loads the checkpoint's VAE; an object, so that a worker process can be given it."""

    folder: Path
    dtype: torch.dtype

    def __call__(self) -> Encoder:
        """The function from frames (n,T,H,W,3) uint8 to latents (n,16,F,h,w) float16."""
        vae = load_vae(self.folder / VAE_FILE, device="cpu", dtype=torch.float32)
        return partial(encode_frames, vae, self.dtype)


@torch.no_grad()
def encode_frames(vae: WanVAE, dtype: torch.dtype, frames: np.ndarray) -> np.ndarray:
    """Frames (n,T,H,W,3) uint8 -> latents (n,16,F,h,w) float16, a few at a time."""
    count = 16 if frames.shape[1] == 1 else 1
    parts = []
    for start in range(0, len(frames), count):
        videos = to_videos(frames[start : start + count], vae.conv1.weight.device)
        parts.append(fast_vae.encode(vae, videos, dtype).half().cpu().numpy())
    return np.concatenate(parts)


def make_text_encoder(config: UMT5Config) -> UMT5Encoder:
    """A text encoder of random weights, but each head looks at one neighbor of a token.

    So a linear function of a color's vector names the shape that has it, in all captions of several objects. With
    random heads it does in 40 to 72 % (notebook 04), and cross-attention cannot tell whose color it is.
    """
    encoder = UMT5Encoder(config)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        position = block.pos_embedding
        for head, distance in zip(range(config.num_heads), cycle(NEIGHBORS)):
            position.embedding.weight.data[position.bucket(torch.tensor(distance)), head] += NEIGHBOR_BIAS
        for layer in (block.attn.v, block.attn.o):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # T5's; nn.Linear's is 1.7 times smaller
    return encoder.half().float()  # as it is stored


def make_tokenizer(file: Path, scenes: int) -> Tokenizer:
    """Write the tokenizer of so many training scenes' captions, and read it."""
    captions = [make_clip(seed, frames=[]).caption for seed in range(scenes)]
    file.write_text(json.dumps(grammar_tokenizer([*captions, *map(casual, captions)])), encoding="utf-8")
    return Tokenizer.from_file(file)


def draw_prompts(rng: Generator, captions: list[str], dropout: float) -> list[str]:
    """The captions: half as written, half casual, a few left out (Ho & Salimans, arXiv 2207.12598)."""
    prompts = []
    for caption in captions:
        prompt = casual(caption) if rng.random() < 0.5 else caption
        prompts.append(EMPTY if rng.random() < dropout else prompt)
    return prompts


def make_example(items: Items, batch: Batch, rng: Generator, wan: Wan, recipe: Recipe, device: torch.device) -> Example:
    """Items of a stream of latents, with noise and prompts."""
    latents = np.stack([item["latents"][:, : batch.frames] for item in items]).astype(np.float32)
    clean = torch.from_numpy(latents).to(device)
    prompts = draw_prompts(rng, [str(item["caption"]) for item in items], recipe.dropout)
    sigma = sample_sigma(rng, len(items))
    noise = normal(rng, clean)
    positions = None
    if "positions" in items[0]:
        true = [item["positions"][: batch.frames, :, : batch.frames] for item in items[: recipe.matched]]
        positions = torch.from_numpy(np.stack(true).astype(np.float32)).to(device)
    return Example(clean, noise, sigma, text_of(wan, prompts), positions)


def train_dit(
    job: Job, recipe: Recipe = DIT, config: DiTConfig = TINY, text: UMT5Config = TINY_UMT5, name: str = "dit"
) -> None:
    """Train the DiT, as the stage of this name; complete the checkpoint folder. Raises MissingFile without a VAE."""
    file = job.folder / VAE_FILE
    if not file.exists():
        raise MissingFile(f"{file} does not exist: run the stage vae with the same --folder first")
    cpu = torch.device("cpu")  # data are made there, by processes that cannot share a GPU
    make_encoder = MakeEncoder(job.folder, pick_dtype(cpu))
    tokenizer_file = job.work / "tokenizer.json"
    tokenizer = make_tokenizer(tokenizer_file, recipe.captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        dit = WanDiT(config)
        text_encoder = make_text_encoder(text)
    encode = make_encoder()
    trainer = Trainer(name, recipe, job, dit, Sampler(Pool(job.work / "data", encode), recipe.streams))
    vae = load_vae(file, device=job.device, dtype=torch.float32)
    wan = Wan(trainer.ema, vae, text_encoder.requires_grad_(False).to(job.device), tokenizer, "tiny")
    probe = Probe(recipe.samples, job.dtype, encode, job.work / f"{name}-curve.jsonl")

    def loss_of(dit: WanDiT, items: Items, batch: Batch, rng: Generator) -> tuple[Tensor, Figures]:
        example = make_example(items, batch, rng, wan, recipe, job.device)
        return flow_loss(dit, example, job.dtype, batch.matching)

    def draw_samples() -> np.ndarray:
        store(wan, tokenizer_file, job.folder)
        return probe.report(wan, trainer.step)

    with workers(job.workers, job.work / "data", recipe.streams, make_encoder):
        trainer.run(loss_of, draw_samples)
    store(wan, tokenizer_file, job.folder)
    if not probe.figures:  # an earlier run took the last step, and was stopped before its record
        probe.report(wan, trainer.step)
    record(trainer, probe.figures)


def store(wan: Wan, tokenizer: Path, folder: Path) -> None:
    """Write the checkpoint folder, weights as float16."""
    dit = deepcopy(wan.dit).cpu().half()
    vae = deepcopy(wan.vae).cpu().half()
    save_wan(folder, dit, vae, deepcopy(wan.text_encoder).cpu().half(), tokenizer)
