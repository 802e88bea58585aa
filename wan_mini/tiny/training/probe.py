"""What training is judged by: attributes of generated pictures and clips, and how well each block's attention matches.

All of it on scenes that training does not draw; never on the held-out clips of the benchmark.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.config import frames_of, latent_shape
from wan_mini.dit import Block, WanDiT
from wan_mini.load import Wan
from wan_mini.scheduler import FlowEuler
from wan_mini.tiny.training import fast_dit, fast_vae
from wan_mini.tiny.training.data import Encoder
from wan_mini.tiny.training.grammar import encode_text, token_table
from wan_mini.tiny.training.matching import moving_tokens
from wan_mini.tiny.training.recipe import CFG, EMPTY, SHIFT
from wan_mini.tiny.training.vae import normal, psnr
from wan_mini.tiny.world import HEIGHT, HELD_OUT, KINDS, WIDTH, Clip, classify_scene, label_pixels, make_clip
from wan_mini.tiny.world.tracks import true_positions
from wan_mini.video import to_uint8

UNSEEN = 10**6  # seeds of this range are in no stream of data
SIGMAS = (0.3, 0.5, 0.7, 0.9)
PICTURE_STEPS = 16
CLIP_STEPS = 12
SAMPLED_CLIPS = 3
PICTURED = ("single", "several", "articulated")  # kinds of the scenes that pictures are sampled of, in turns


class Probe:
    """Samples and figures at every save, appended to a file of one JSON object a line.

    count: true clips; three times as many scenes for pictures, and again as many with a held-out pair.
    """

    def __init__(self, count: int, dtype: torch.dtype, encode: Encoder, file: Path):
        self.dtype = dtype
        self.file = file
        self.clips: list[Clip] = []
        positions = []
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            self.clips.append(make_clip(UNSEEN + 100 + number, kind))
            positions.append(true_positions(UNSEEN + 100 + number, kind))
        self.positions = torch.from_numpy(np.stack(positions))  # (n,F,S,F,2)
        self.latents = torch.from_numpy(encode(np.stack([clip.frames for clip in self.clips]))).float()
        self.scenes: list[Clip] = []
        for number in range(3 * count):
            self.scenes.append(make_clip(UNSEEN + number, PICTURED[number % len(PICTURED)], frames=[16]))
        self.held_out = held_out_scenes(count)
        self.figures: dict[str, Any] = {}  # the last ones

    @torch.no_grad()
    def report(self, wan: Wan, step: int) -> np.ndarray:
        """Measure, append a line to the file, and return a grid of all pictures and of some clips (rows,columns,3)."""
        scenes = self.scenes + self.held_out
        pictures = sample(wan, [scene.caption for scene in scenes], 1, PICTURE_STEPS, self.dtype)  # (n,1,H,W,3)
        attributes = [shown(video, scene) for video, scene in zip(pictures, scenes, strict=True)]
        known = len(self.scenes)
        some = self.clips[:SAMPLED_CLIPS]
        clips = sample(wan, [clip.caption for clip in some], self.latents.shape[2], CLIP_STEPS, self.dtype)
        self.figures = {
            "step": step,
            "pictures": shares(attributes[:known]),
            **{kind: shares(attributes[first : known : len(PICTURED)]) for first, kind in enumerate(PICTURED)},
            "held-out pairs": shares(attributes[known:]),
            "denoising": {sigma: self.denoising(wan, sigma) for sigma in SIGMAS[1:]},
            "matching": matching_shares(wan.dit, self.latents.to(wan.device), self.positions.to(wan.device)),
            "clips": [shown(video[::8], clip) for video, clip in zip(clips, some, strict=True)],
        }
        line = json.dumps(self.figures)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
        return sample_grid(pictures[:, 0], clips)

    def denoising(self, wan: Wan, sigma: float) -> float:
        """PSNR in pixels of one step from noise level sigma to a clean clip, in dB, over first frames of clips."""
        clean = self.latents[:, :, :1].to(wan.device)
        noisy = (1 - sigma) * clean + sigma * normal(np.random.default_rng(0), clean)
        text = text_of(wan, [clip.caption for clip in self.clips])
        timestep = torch.full((len(clean),), 1000 * sigma)
        velocity, _ = fast_dit.velocity(wan.dit, noisy, timestep, text, self.dtype)
        frames = decode_frames(wan, noisy - sigma * velocity, self.dtype)
        return round(psnr(frames, np.stack([clip.frames[:1] for clip in self.clips])), 2)


def held_out_scenes(count: int) -> list[Clip]:
    """Single objects whose pair of shape and color is held out; other seeds than the benchmark's."""
    scenes: list[Clip] = []
    seed = UNSEEN
    while len(scenes) < count:
        clip = make_clip(seed, "single", "held-out", [16])
        if not HELD_OUT.isdisjoint(clip.objects):
            scenes.append(clip)
        seed += 1
    return scenes


def shown(video: np.ndarray, scene: Clip) -> dict[str, bool]:
    """Whether colors, background and shapes of frames (T,H,W,3) are the scene's."""
    right = classify_scene(video, label_pixels(video), scene)[1]
    return {key: bool(value) for key, value in right.items()}


def shares(attributes: Sequence[dict[str, bool]]) -> dict[str, float]:
    """For each attribute, the share of samples that have it right."""
    return {key: round(float(np.mean([one[key] for one in attributes])), 3) for key in attributes[0]}


def text_of(wan: Wan, prompts: list[str]) -> Tensor:
    """The text encoder's output for prompts, (B,L,C), zeros at padding."""
    return encode_text(wan.text_encoder, token_table(wan.tokenizer, prompts).to(wan.device))


def decode_frames(wan: Wan, latents: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Latents (B,16,F,h,w) -> frames (B,4F-3,H,W,3) uint8, one clip at a time."""
    return np.stack([to_uint8(fast_vae.decode(wan.vae, one, dtype)) for one in latents.split(1)])


def sample(
    wan: Wan,
    prompts: list[str],
    frames: int,
    steps: int,
    dtype: torch.dtype,
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> np.ndarray:
    """Videos of prompts, (B,4F-3,H,W,3) uint8, by Euler steps with classifier-free guidance, from fixed noise.

    frames: latent frames F. size: height and width in pixels.
    """
    shape = (len(prompts), *latent_shape(frames_of(frames), *size)[1:])
    latents = normal(np.random.default_rng(0), torch.empty(shape, device=wan.device))
    text = text_of(wan, [*prompts, *[EMPTY] * len(prompts)])
    scheduler = FlowEuler(steps, SHIFT)
    for index, timestep in enumerate(scheduler.timesteps):
        both = torch.cat([latents, latents])  # (2B,...): with a prompt and without
        velocity, _ = fast_dit.velocity(wan.dit, both, timestep.expand(len(both)), text, dtype)
        conditional, unconditional = velocity.chunk(2)
        latents = scheduler.step(index, latents, unconditional + CFG * (conditional - unconditional))
    return decode_frames(wan, latents, dtype)


def matching_shares(dit: WanDiT, latents: Tensor, positions: Tensor) -> dict[str, list[float]]:
    """For each noise level and block: the share of moving tokens whose dense argmax is within a token of the truth.

    latents (B,16,F,h,w), positions (B,F,S,F,2) absolute in tokens, NaN where hidden. A token moves towards a frame if
    it is more than one token away there, so that attention to its own position scores 0. Prompts are empty: all zeros.
    """
    grid = dit.grid(latents)
    noise = normal(np.random.default_rng(1), latents)
    text = latents.new_zeros(1, 1, dit.config.text_dim)
    table = {}
    for sigma in SIGMAS:
        noisy = (1 - sigma) * latents + sigma * noise
        counts = torch.zeros(len(dit.blocks), 2)
        for number in range(len(latents)):
            pairs = queries_and_keys(dit, noisy[number : number + 1], 1000 * sigma, text)
            for block, (q, k) in enumerate(pairs):
                counts[block] += hits(q, k, positions[number], grid).cpu()
        table[str(sigma)] = [round(float(near / moving), 3) for near, moving in counts]
    return table


def queries_and_keys(dit: WanDiT, noisy: Tensor, timestep: float, text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys (1,N,M,D) of every block in one pass, by hooks on the blocks' inputs."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def hook(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, modulation, _, rope = inputs
        pairs.append(cast(Block, block).qk(x, modulation, rope))

    handles = [block.register_forward_pre_hook(hook) for block in dit.blocks]
    try:
        dit(noisy, torch.tensor([timestep]), text)
    finally:
        for handle in handles:
            handle.remove()
    return pairs


def hits(q: Tensor, k: Tensor, positions: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(matched, moving) numbers of a clip's tokens: q, k (1,N,M,D), positions (F,S,F,2)."""
    frames, _, columns = grid
    logits = q.flatten(2)[0] @ k.flatten(2)[0].mT  # (N,N)
    best = logits.unflatten(1, (frames, -1)).argmax(-1)  # (N,N) -> (N,F,S) -> (N,F)
    matched = torch.stack([best // columns, best % columns], dim=-1)  # (N,F,2)
    true = positions.flatten(0, 1)  # (F,S,F,2) -> (N,F,2)
    moving = moving_tokens(true, grid, 1)  # (N,F)
    near = (matched - true).abs().amax(-1) <= 1
    return torch.stack([(near & moving).sum(), moving.sum()]).float()


def sample_grid(pictures: np.ndarray, clips: np.ndarray) -> np.ndarray:
    """Pictures (n,H,W,3) at half size in rows of 8, and below them clips (m,T,H,W,3) as rows of 8 frames."""
    frames = np.concatenate([pictures, clips[:, ::4][:, :8].reshape(-1, HEIGHT, WIDTH, 3)])
    missing = -len(frames) % 8
    frames = np.pad(frames, ((0, missing), (0, 0), (0, 0), (0, 0)))
    small = F.avg_pool2d(torch.from_numpy(frames).movedim(-1, 1).float(), 2).byte()  # (n,3,H/2,W/2)
    tiles = small.unflatten(0, (-1, 8)).permute(0, 3, 1, 4, 2)  # -> (rows,8,3,H/2,W/2) -> (rows,H/2,8,W/2,3)
    return tiles.reshape(-1, 8 * WIDTH // 2, 3).numpy()
