"""Whole runs as plain loops, for tests that compare a program with them: notebook 10's transfer, and text to video."""

import torch
from naive import naive
from torch import Tensor

from fastvmt import MotionConfig
from losses import amf_loss, total_loss, window_loss
from wan_mini.load import Wan
from wan_mini.noise import start_noise
from wan_mini.prompts import encode_prompts
from wan_mini.scheduler import FlowEuler, FlowUniPC
from window import dense_amf, frame_pairs, tile_centers, windowed_amf

CPU = torch.device("cpu")
notebook = naive("10_fastvmt")


def guidance(wan: Wan, z_ref: Tensor, text: Tensor, empty_text: Tensor, c: MotionConfig):
    """Notebook 10's windowed guidance, for every choice of amf, window_anchor, centroid and reference."""
    grid = wan.dit.grid(z_ref)
    pairs = frame_pairs(grid[0], c.span)

    def centers_of(qk):
        return tile_centers(*qk, grid, pairs, tile=c.tile, kind=c.centroid, tau=c.tau)

    def flow(qk, source):
        if c.amf == "dense":
            return dense_amf(*qk, grid, pairs, tau=c.tau), None
        centers = centers_of(source)
        return windowed_amf(*qk, grid, pairs, tau=c.tau, tile=c.tile, window=c.window, centers=centers)

    def loss_at(t, noised):
        clean = notebook.queries_keys(wan, z_ref, 0.0, empty_text, c)
        reference = clean if c.reference == "clean" else notebook.queries_keys(wan, noised, t, empty_text, c)
        shared = {"clean": clean, "noised": reference, "self": None}[c.window_anchor]
        target, _ = flow(reference, shared or reference)

        def loss(x):
            qk = notebook.queries_keys(wan, x, t, text, c)
            predicted, windows = flow(qk, shared or qk)
            amf = amf_loss(target, predicted, pairs, c.span, c.alpha)
            tracking = torch.zeros(()) if windows is None else window_loss(qk[1], grid, pairs, windows)
            return total_loss(amf, tracking, c.weights)

        return loss

    return loss_at


def transfer(wan: Wan, clip, prompt: str, c: MotionConfig, seed: int = 0):
    """Latents, the losses at each gradient, frames."""
    return notebook.transfer_by_hand(wan, clip, prompt, c, seed, guidance)


def clip_flow(wan: Wan, latents: Tensor, c: MotionConfig) -> Tensor:
    """Flow of a clean clip from each latent frame to the next, read without a prompt, around its own matches."""
    grid = wan.dit.grid(latents)
    empty_text = encode_prompts(wan, [""], CPU)[0]
    with torch.no_grad():
        qk = notebook.queries_keys(wan, latents, 0.0, empty_text, c)
    return windowed_amf(*qk, grid, frame_pairs(grid[0], 1), tau=c.tau, tile=c.tile, window=c.window)[0]


@torch.no_grad()
def generate(
    wan: Wan,
    prompt: str,
    negative: str,
    *,
    height: int = 64,
    width: int = 96,
    frames: int = 5,
    steps: int = 2,
    sampler: str = "unipc",
    shift: float = 8.0,
    cfg: float = 6.0,
    seed: int = 0,
    key: str = "",
) -> Tensor:
    """Latents of plain text to video."""
    text, without = encode_prompts(wan, [prompt, negative], CPU)
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    x = start_noise(shape, seed, key, wan.name)
    scheduler = FlowUniPC(steps, shift) if sampler == "unipc" else FlowEuler(steps, shift)
    for index, t in enumerate(scheduler.timesteps):
        conditional = wan.dit(x, t.reshape(1), text)
        unconditional = wan.dit(x, t.reshape(1), without)
        x = scheduler.step(index, x, unconditional + cfg * (conditional - unconditional))
    return x
