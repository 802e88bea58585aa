"""Train the tiny Wan from a seed to a checkpoint, with six commands:

    python -m wan_mini.tiny.train vae        the VAE, on pictures, then on short clips
    python -m wan_mini.tiny.train decoder    its decoder alone, for sharper videos from the same latents
    python -m wan_mini.tiny.train dit        DiT and text encoder, on that VAE's latents of pictures, then of clips
    python -m wan_mini.tiny.train motion     the same two, until one block's attention follows what moves
    python -m wan_mini.tiny.train words      a new text encoder, that knows which color goes with which noun
    python -m wan_mini.tiny.train shapes     the DiT alone, until the tokens of a thing agree on what it is

The same command again goes on where the last one stopped. Whatever a step draws follows from its seed and its number
alone, so there are no generators to save, and a run with pauses ends with the same bits as one without (on a CPU; a
GPU adds up gradients in any order).
"""

import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from safetensors.torch import save_file
from torch import Tensor, nn

from wan_mini.config import TINY, TINY_UMT5, TINY_VAE, DiTConfig, UMT5Config, VAEConfig
from wan_mini.device.select import pick_device
from wan_mini.dit import WanDiT
from wan_mini.generate import SAMPLING, generate
from wan_mini.hashes import sha256_file
from wan_mini.load import Wan, load_vae, load_wan, save_wan
from wan_mini.pipeline import decode
from wan_mini.runs.cli import Parser, run
from wan_mini.scheduler import FlowEuler, shift_sigma
from wan_mini.tiny.data import SHARD, cached, crops, make_closeup, make_picture, to_videos
from wan_mini.tiny.grammar import casual, grammar_tokenizer, token_table
from wan_mini.tiny.loop import Job, Recipe, Training
from wan_mini.tiny.matching import matching_loss
from wan_mini.tiny.parts import near_sprites, parts_loss, reader, stream_after, true_parts
from wan_mini.tiny.words import lexicon, spoken_pairs, word_reader, words_loss
from wan_mini.tiny.world import FRAMES, HEIGHT, KINDS, LATENT_FRAMES, WIDTH, make_clip, middle_frames, true_positions
from wan_mini.tokenizer import Tokenizer
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import AttentionBlock, CausalConv3d, ResidualBlock, WanVAE
from wan_mini.video import to_uint8

VAE_FILE = "Wan2.1_VAE.safetensors"  # as save_wan names it
SHIFT, CFG, EMPTY = SAMPLING["tiny"]  # EMPTY stands in for a caption left out
DROPOUT = 0.1  # share of captions left out, so that guidance has a model of videos without a caption
NOISE = 0.03  # on the latents while the VAE learns, in standard deviations
VAE_PHASES = (  # until this share of the steps: frames, height and width of the crops, crops per --batch
    (0.3, 1, 64, 64, 1),  # a causal VAE codes its first frame alone, so pictures train that path, and fast
    (0.93, 5, 64, 64, 1 / 2),
    (1.0, 17, HEIGHT, WIDTH, 1 / 16),  # whole frames, because the attention in the middle looks at all positions
)
DECODER_PHASES = (
    (0.9, 5, 64, 64, 1 / 2),
    (1.0, 17, HEIGHT, WIDTH, 1 / 16),
)
DIT_PHASES = (  # until this share of the steps, in turns: which latents, how many frames, and how many per --batch
    (0.105, [("pictures", 1, 8)]),  # what things look like, at a ninth of a clip's tokens and less attention
    (0.18, [("clips", 3, 2)]),  # how they begin to move: latents are causal, so a clip's first are a shorter clip's
    (0.3, [("clips", 9, 1)]),
    (0.3626, [("closeups", 1, 32)]),  # which word means which shape, drawn large
    (1.0, [("closeups", 1, 32), ("clips", 9, 1), ("pictures", 1, 8), ("clips", 9, 1)]),  # all of it
)
MOTION_PHASES = (
    (0.5, [("clips", 9, 1), ("clips", 9, 1), ("pictures", 1, 8), ("clips", 9, 1)]),
    (1.0, [("closeups", 1, 32), ("clips", 9, 1), ("pictures", 1, 8), ("clips", 9, 1)]),  # what words mean, once more
)
SHAPES_PHASES = (
    (0.4, [("pictures", 1, 8), ("pictures", 1, 8), ("clips", 9, 1)]),
    (1.0, [("pictures", 1, 8), ("clips", 9, 1)]),
)
MATCHING_BLOCK, MATCHING_TAU = 3, 3.0  # whose queries and keys learn to match, and at which tau: TINY_MOTION's
MATCHING_WEIGHT, PARTS_WEIGHT = 0.1, 0.2  # beside the velocity's error; parts are read where MATCHING_BLOCK begins
SPRITES_WEIGHT, SPRITES_SIGMA = 6.0, 0.8  # errors on sprites, a tenth of most frames, count more up to this noise
PER_CLIP = {"pictures": 4, "clips": 1, "closeups": 8}  # latents of each sort that the DiT is trained on, per --clips
UNSEEN = 10**6  # seeds from here on are never trained on: clips for the sample sheets
RECIPES = {
    # Clips are coarser samples than pictures, fewer to a batch: they want a quarter of the rate.
    "vae": Recipe(steps=1500, batch=16, clips=1024, decay=((0, 1), (0.3, 0.25), (1, 0))),
    "decoder": Recipe(steps=600, batch=16, clips=1024, lr=5e-3, adam_lr=7.5e-4),
    # 2,400 steps, down to rate 0, were too few, and 5,600 still: so the rate rose again, twice.
    "dit": Recipe(
        steps=8000,
        batch=8,
        clips=1024,
        lr=0.03,
        ema=0.998,
        decay=((0, 1), (0.105, 0.6), (0.3, 0), (0.3075, 0.6), (0.7, 0), (0.709, 0.6), (1, 0)),
    ),
    # On clips, with so few captions a step, words lost their meaning: close-ups came back, and the rate rose twice.
    "motion": Recipe(
        steps=3600,
        batch=8,
        clips=1024,
        lr=0.018,
        adam_lr=1.8e-3,
        ema=0.998,
        decay=((0, 1), (0.5, 0), (0.5067, 0.6), (0.6667, 0), (0.6733, 0.6), (1, 0)),
    ),
    "words": Recipe(steps=1000, batch=128, clips=1024, lr=0.015, adam_lr=3e-3, ema=0.99),
    "shapes": Recipe(steps=6000, batch=8, clips=1024, lr=0.015, adam_lr=1.5e-3, ema=0.998),
}


# The ideas, one function each.


def normal(rng: Generator, like: Tensor) -> Tensor:
    """Standard normal noise shaped like a tensor, drawn on its device."""
    generator = torch.Generator(like.device).manual_seed(int(rng.integers(2**32)))
    return torch.randn(like.shape, generator=generator, device=like.device)


def sample_sigma(rng: Generator, batch: int, shift: float = SHIFT) -> Tensor:
    """(B,) noise levels in [0,1], shifted as the sampler's will be.

    Each is uniform before the shift, and together they are evenly spaced, which makes the loss less noisy: Kingma et
    al., Variational Diffusion Models (arXiv 2107.00630), appendix I.
    """
    u = (rng.random() + np.arange(batch) / batch) % 1
    return shift_sigma(torch.from_numpy(u), shift).float()


def drop_captions(rng: Generator, ids: Tensor, empty: Tensor, rate: float = DROPOUT) -> Tensor:
    """Replace some rows of ids (B,L) by the empty prompt (L,). Ho & Salimans (arXiv 2207.12598)."""
    dropped = torch.from_numpy(rng.random(len(ids)) < rate)
    return torch.where(dropped[:, None], empty, ids)  # (B,1) picks (L,) or (B,L) -> (B,L)


class Truth(NamedTuple):
    """What the world knows about a batch of latents, for each loss that is wanted beside the velocity's."""

    places: Tensor | None = None  # (B,F,S,F,2) of matching.py
    parts: Tensor | None = None  # (B,N,5) of parts.py
    sprites: Tensor | None = None  # (B,F,h,w) bool of parts.py


def flow_loss(model: nn.ModuleDict, clean: Tensor, noise: Tensor, sigma: Tensor, ids: Tensor, truth: Truth) -> Tensor:
    """Squared error of the velocity: from clean latents (B,16,F,h,w) straight to noise. sigma (B,), ids (B,L).

    The model is dit, text and, where parts are given, reader. Places add how badly MATCHING_BLOCK matches; parts, how
    badly the reader tells them; with sprites, errors there count more, where they can be seen through the noise.
    Source: rectified flow (arXiv 2209.03003); Wan technical report (arXiv 2503.20314), section 4.2.
    """
    dit, level = model["dit"], sigma.to(clean.device)[:, None, None, None, None]  # (B,) -> (B,1,1,1,1)
    noisy = (1 - level) * clean + level * noise
    ids = ids.to(clean.device)
    mask = (ids != 0).long()  # 0 is padding
    text = model["text"](ids, mask) * mask[..., None]  # rows at padding mean nothing: the DiT wants zeros there
    qk: list[Tensor] = []
    with ExitStack() as hooks:
        streams = []
        if truth.parts is not None:
            streams = hooks.enter_context(stream_after(dit.blocks[MATCHING_BLOCK - 1]))
        if truth.places is not None:
            block = dit.blocks[MATCHING_BLOCK]
            hook = block.register_forward_pre_hook(lambda _, args: qk.extend(block.qk(args[0], args[1], args[3])))
            hooks.callback(hook.remove)
        velocity = dit(noisy, 1000 * sigma, text)
    error = (velocity - (noise - clean)).square()
    if truth.sprites is not None:
        weight = 1 + (SPRITES_WEIGHT - 1) * (truth.sprites[:, None] & (level <= SPRITES_SIGMA))  # (B,1,F,h,w)
        error = error * weight / weight.mean()
    loss = error.mean()
    if truth.places is not None:
        loss = loss + MATCHING_WEIGHT * matching_loss(*qk, truth.places, dit.grid(clean), MATCHING_TAU)
    if truth.parts is not None:
        loss = loss + PARTS_WEIGHT * parts_loss(model["reader"](streams[0]).float(), truth.parts)
    return loss


def vae_loss(vae: WanVAE, video: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """Error of the reconstruction of a video (B,3,T,H,W) from its latents with a little noise: L1, and some L2.

    L1 keeps edges sharp, L2 minds the few large errors, which are where things move.

    The noise teaches the decoder to forgive small errors such as a DiT's. Its size follows each channel's own: next to
    noise of a fixed size the young latents, still tiny, would be worth nothing, and would stay so. That also replaces
    the usual KL divergence, which shrinks latents until noise matters.
    """
    latents = vae.encode(video)
    size = latents.detach().std((0, 2, 3, 4), keepdim=True)  # (B,16,F,h,w) -> (1,16,1,1,1)
    error = vae.decode(latents + NOISE * size * noise(latents)) - video
    return error.abs().mean() + 5 * error.square().mean()


@torch.no_grad()
def good_start(vae: WanVAE) -> WanVAE:
    """Begin as a code of single pictures, nearly linear, through which signals and gradients pass at full strength.

    Weights keep the signal's size (He et al., arXiv 1502.01852; PyTorch's default shrinks it threefold a layer).
    Residual branches begin at zero, so the shortcuts alone speak at first (arXiv 1901.09321). Nothing looks at the
    past, and time is only thinned out and repeated: what pictures teach is then a good start for clips, from which the
    zeros learn.
    """
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.orthogonal_(layer.weight)
        if isinstance(layer, CausalConv3d):
            layer.weight[:, :, :-1] = 0
            if layer.kernel_size[1] == 1:  # halves or doubles time: keep the last frame of two, or make two of one
                copies = torch.eye(layer.in_channels).repeat(layer.out_channels // layer.in_channels, 1)
                layer.weight[:, :, -1, 0, 0] = copies  # (C or 2C, C)
                layer.bias.zero_()
            else:
                layer.weight[:, :, -1] = nn.init.orthogonal_(torch.empty(layer.weight[:, :, -1].shape))
    for layer in vae.modules():
        if isinstance(layer, ResidualBlock):
            layer.residual[6].weight.zero_()
        if isinstance(layer, AttentionBlock):
            layer.proj.weight.zero_()
    return vae


# The stages.


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Random weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def halved(module: nn.Module) -> nn.Module:
    """The weights as they are stored: float16, 8 times finer than bfloat16, and exact again in float32."""
    return module.cpu().half()


def fit_vae(name: str, job: Job, vae: WanVAE, phases: Sequence[tuple], shards: list[np.ndarray]) -> Training:
    """Train what needs a gradient of a VAE; its average comes out rounded to the float16 in which it is stored."""
    training, unseen = Training(name, job, vae), unseen_clips()

    def loss_of(vae: WanVAE, step: int, rng: Generator) -> Tensor:
        frames = crops(rng, shards, phases, step / job.recipe.steps, job.recipe.batch)
        return vae_loss(vae, to_videos(frames, job.device), partial(normal, rng))

    def sheet() -> np.ndarray:
        rows = np.stack([unseen, restore(training.ema, unseen)], axis=1)[:, :, ::4]  # two (n,9,H,W,3) -> (n,2,3,H,W,3)
        return rows.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3 * WIDTH, 3)  # -> (n,2,H,3,W,3) -> (2nH,3W,3)

    training.run(loss_of, sheet)
    training.ema.load_state_dict(halved(deepcopy(training.ema)).state_dict())
    return training


def unseen_clips() -> np.ndarray:
    """The beginning of a clip of each kind that training never sees: (n,9,H,W,3) uint8."""
    return np.stack([make_clip(UNSEEN + i, kind, frames=range(9)).frames for i, kind in enumerate(KINDS)])


@torch.no_grad()
def restore(vae: WanVAE, frames: np.ndarray) -> np.ndarray:
    """Clips (n,T,H,W,3) uint8 through encoder and decoder."""
    videos = vae.decode(vae.encode(to_videos(frames, vae.conv1.weight.device)))
    return np.stack([to_uint8(video[None]) for video in videos])


def store_vae(training: Training) -> None:
    """Write the VAE to the checkpoint folder, and how good it is."""
    vae, unseen = training.ema, unseen_clips()
    error = np.square(restore(vae, unseen) / 255.0 - unseen / 255.0).mean()
    training.job.folder.mkdir(parents=True, exist_ok=True)
    save_file(halved(vae).state_dict(), training.job.folder / VAE_FILE, {"config": json.dumps(asdict(vae.config))})
    training.report(**{"PSNR of four unseen clips": f"{-10 * np.log10(error):.2f} dB"})


@torch.no_grad()
def encode(vae: WanVAE, device: torch.device, frames: np.ndarray) -> np.ndarray:
    """Clips (n,T,H,W,3) uint8 -> latents (n,16,F,h,w) float16, 8 clips at a time."""
    parts = [vae.encode(to_videos(frames[at : at + 8], device)) for at in range(0, len(frames), 8)]
    return torch.cat(parts).half().cpu().numpy()


def train_vae(job: Job, config: VAEConfig = TINY_VAE) -> None:
    """Train the VAE, measure the statistics of its latents, write it to the checkpoint folder."""
    plain = replace(config, mean=(0.0,) * config.z_dim, std=(1.0,) * config.z_dim)
    shards, _ = cached(job, "frames", job.recipe.clips, lambda frames: frames)
    training = fit_vae("vae", job, seeded(job.seed, lambda: good_start(WanVAE(plain))), VAE_PHASES, shards)
    latents = encode(training.ema, job.device, shards[0]).astype(np.float32)  # (n,16,F,h,w)
    mean, std = (f(latents, axis=(0, 2, 3, 4)).tolist() for f in (np.mean, np.std))  # -> (16,) each
    training.ema.config = replace(config, mean=tuple(mean), std=tuple(std))
    store_vae(training)


def train_decoder(job: Job) -> None:
    """Train the decoder of the checkpoint's VAE, and nothing else: a DiT of its latents stays right."""
    vae = stored_vae(job)
    for part in (vae.conv2, vae.decoder):
        part.requires_grad_()
    shards, _ = cached(job, "frames", job.recipe.clips, lambda frames: frames)
    store_vae(fit_vae("decoder", job, vae, DECODER_PHASES, shards))


def stored_vae(job: Job) -> WanVAE:
    """The checkpoint's VAE in float32. Raises FileNotFoundError if there is none."""
    if not (file := job.folder / VAE_FILE).exists():
        raise FileNotFoundError(f"{file} does not exist: run the stage vae with the same --folder first")
    return load_vae(file, device=job.device, dtype=torch.float32)


def train_dit(job: Job, config: DiTConfig = TINY, text: UMT5Config = TINY_UMT5) -> None:
    """Train DiT and text encoder together on the latents of training clips; complete the checkpoint folder."""
    vae = stored_vae(job)
    shards, captions = latents_of(job, vae, DIT_PHASES)
    texts = captions["pictures"] + captions["clips"]  # close-ups show the same scenes, and some more
    texts = [*texts, *map(casual, texts)]
    (job.work / "tokenizer.json").write_text(json.dumps(grammar_tokenizer(texts)), encoding="utf-8")
    tokenizer = Tokenizer.from_file(job.work / "tokenizer.json")
    dit, encoder = seeded(job.seed, lambda: nn.ModuleList([WanDiT(config), UMT5Encoder(text)]))
    fit_dit("dit", job, Wan(dit, vae, encoder, tokenizer, "tiny"), DIT_PHASES, shards, captions)


def stored_wan(job: Job) -> Wan:
    """The checkpoint in float32; its tokenizer goes to the work folder. Raises FileNotFoundError if there is none."""
    if not (job.folder / "config.json").exists():
        raise FileNotFoundError(f"{job.folder} has no transformer: run the stage dit with the same --folder first")
    shutil.copy(next(job.folder.rglob("tokenizer.json")), job.work)
    return load_wan(job.folder, device=job.device, dtype=torch.float32)


def train_on(name: str, job: Job, phases: Sequence[tuple]) -> None:
    """Train the checkpoint's DiT on, and in motion its text encoder, with the world's truth about the latents."""
    wan = stored_wan(job)
    shards, captions = latents_of(job, wan.vae, phases)
    wan.dit.requires_grad_()
    wan.text_encoder.requires_grad_(name == "motion")  # later it stays as the stage words made it
    fit_dit(name, job, wan, phases, shards, captions)


def train_words(job: Job) -> None:
    """Train a new text encoder to say what the checkpoint's does, and to which pair of color and noun a word belongs.

    New, because the old one cannot learn it any more: Muon has made its queries and keys so large that each token
    looks at one other, and UMT5 neither norms nor scales them.
    """
    wan = stored_wan(job)
    old, config = wan.text_encoder, wan.text_encoder.config

    def fresh() -> nn.ModuleDict:
        return nn.ModuleDict({"text": UMT5Encoder(config), "reader": word_reader(config.dim)})

    training, known = Training("words", job, seeded(job.seed, fresh)), lexicon(wan.tokenizer, config.vocab)
    captions = [make_clip(seed, frames=[]).caption for seed in range(PER_CLIP["pictures"] * job.recipe.clips)]
    ids = token_table(wan.tokenizer, [*captions, *map(casual, captions), EMPTY])

    def loss_of(model: nn.ModuleDict, step: int, rng: Generator) -> Tensor:
        rows = ids[rng.integers(len(ids), size=job.recipe.batch)]  # (B,L)
        pairs, rows = spoken_pairs(rows, known).to(job.device), rows.to(job.device)
        mask = (rows != 0).long()  # 0 is padding
        vectors, wanted = model["text"](rows, mask), old(rows, mask)
        same = (vectors - wanted)[mask > 0].square().mean()
        return words_loss(model["reader"](vectors), pairs) + same

    training.run(loss_of)
    save_wan(job.folder, halved(wan.dit), halved(wan.vae), halved(training.ema["text"]), job.work / "tokenizer.json")
    training.report()


def latents_of(
    job: Job, vae: WanVAE, phases: Sequence[tuple]
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[str]]]:
    """Shards of latents of each sort of training data that the phases take, and their captions."""
    code, coder, shards, captions = sha256_file(job.folder / VAE_FILE)[:8], partial(encode, vae, job.device), {}, {}
    wanted = {sort for _, turns in phases for sort, *_ in turns}
    for name, make in (("pictures", make_picture), ("clips", make_clip), ("closeups", make_closeup)):
        if name in wanted:
            count = PER_CLIP[name] * job.recipe.clips
            shards[name], captions[name] = cached(job, f"{name}-{code}", count, coder, make)
    return shards, captions


def truth_of(name: str, sort: str, seed: int) -> Truth:
    """What a stage is told about one picture or clip; as in Truth, without the batch."""
    if name == "dit" or sort == "closeups":
        return Truth()
    places = torch.from_numpy(true_positions(seed)) if sort == "clips" else None
    if name == "motion":
        return Truth(places)
    times = LATENT_FRAMES if sort == "clips" else [[seed % FRAMES]]  # as make_picture
    parts = torch.from_numpy(true_parts(seed, middle_frames(times)))  # (F,S,5)
    return Truth(places, parts.flatten(0, 1), torch.from_numpy(near_sprites(seed, times)))


def fit_dit(name: str, job: Job, wan: Wan, phases: Sequence[tuple], shards: dict, captions: dict) -> None:
    """Train what needs a gradient of DiT and text encoder through a stage's phases, then write both and the rest."""
    # Of each sort (2n+1,L): captions as written, casual, and the empty one.
    ids = {sort: token_table(wan.tokenizer, [*some, *map(casual, some), EMPTY]) for sort, some in captions.items()}
    model = nn.ModuleDict({"dit": wan.dit, "text": wan.text_encoder})
    if name == "shapes":
        model["reader"] = seeded(job.seed, lambda: reader(wan.dit.config.dim))
    training, told = Training(name, job, model), cache(partial(truth_of, name))
    prompts = [make_clip(UNSEEN + i, kind, frames=[]).caption for i, kind in enumerate(("single", "articulated"))]

    def loss_of(model: nn.ModuleDict, step: int, rng: Generator) -> Tensor:
        turns = next(turns for end, turns in phases if step / job.recipe.steps < end)
        sort, frames, share = turns[step % len(turns)]
        picks = rng.integers(len(captions[sort]), size=max(1, round(job.recipe.batch * share)))
        clean = np.stack([shards[sort][pick // SHARD][pick % SHARD][:, :frames] for pick in picks])  # (B,16,F,h,w)
        clean = torch.from_numpy(clean).to(job.device).float()
        rows = ids[sort][rng.choice([0, len(captions[sort])], size=len(picks)) + picks]  # as written, or casual: (B,L)
        rows = drop_captions(rng, rows, ids[sort][-1])
        truths = zip(*(told(sort, int(pick)) for pick in picks))
        truth = Truth(*(None if each[0] is None else torch.stack(each).to(job.device) for each in truths))
        return flow_loss(model, clean, normal(rng, clean), sample_sigma(rng, len(picks)), rows, truth)

    def sheet() -> np.ndarray:
        average = replace(wan, dit=training.ema["dit"], text_encoder=training.ema["text"])
        sampler = {"scheduler": FlowEuler(12, SHIFT), "cfg": CFG, "seed": 0, "negative": EMPTY, "device": job.device}
        latents = [generate(average, prompt, size=(HEIGHT, WIDTH), frames=FRAMES, **sampler) for prompt in prompts]
        clips = [decode(wan.vae, z, job.device)[::8] for z in latents]  # (5,H,W,3) each
        rows = [np.concatenate([*clip], axis=1) for clip in clips]  # -> (H,5W,3) each
        return np.concatenate(rows)  # -> (2H,5W,3)

    training.run(loss_of, sheet)
    dit, text_encoder = halved(training.ema["dit"]), halved(training.ema["text"])
    save_wan(job.folder, dit, halved(wan.vae), text_encoder, job.work / "tokenizer.json")
    training.report()


STAGES = {
    "vae": train_vae,
    "decoder": train_decoder,
    "dit": train_dit,
    "motion": partial(train_on, "motion", phases=MOTION_PHASES),
    "words": train_words,
    "shapes": partial(train_on, "shapes", phases=SHAPES_PHASES),
}


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m wan_mini.tiny.train", description="Train the tiny Wan, stage by stage.")
    p.add_argument("stage", choices=list(RECIPES))
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--folder", type=Path, default=Path("wan_mini/tiny/checkpoint"), help="the result (%(default)s)")
    p.add_argument("--work", type=Path, default=Path("outputs/tiny"), help="clips, states, pictures (%(default)s)")
    for name in ("steps", "batch", "clips"):
        defaults = ", ".join(f"{stage} {getattr(recipe, name)}" for stage, recipe in RECIPES.items())
        p.add_argument(f"--{name}", type=int, help=defaults)
    p.add_argument("--seed", type=int, default=0, help="%(default)s")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that render clips (%(default)s)")
    p.add_argument("--minutes", type=float, default=math.inf, help="pause after so many")
    return p


def program(argv: list[str] | None) -> None:
    """Parse, then train."""
    args = parser().parse_args(argv)
    given = {name: n for name in ("steps", "batch", "clips") if (n := getattr(args, name)) is not None}
    if min([*given.values(), args.workers, args.seed + 1]) < 1 or not args.minutes > 0:
        raise ValueError("--steps, --batch, --clips, --workers and --minutes must be positive, --seed not negative")
    torch.backends.cudnn.benchmark = True  # shapes stay the same for thousands of steps
    command = shlex.join(["python", "-m", "wan_mini.tiny.train", *(sys.argv[1:] if argv is None else argv)])
    recipe, deadline = replace(RECIPES[args.stage], **given), time.monotonic() + 60 * args.minutes
    job = Job(recipe, args.work, args.folder, pick_device(args.device), args.seed, args.workers, deadline, command)
    STAGES[args.stage](job)


if __name__ == "__main__":
    raise SystemExit(run(program))
