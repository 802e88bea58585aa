"""The only sampling loop here: a model, a scheduler, classifier-free guidance, and a hook before each step.

    latents = denoise(dit, noise, scheduler, text, negative_text, cfg)                      # text-to-video
    latents = denoise(dit, noise, scheduler, text, negative_text, cfg, guidance=FastVMT(...))  # motion transfer

A method that steers sampling is a `Guidance`: it changes the latents before a step and never copies this loop.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wan_mini.attention import OneProcess
from wan_mini.config import latent_shape
from wan_mini.device.select import exact_float32
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError, check_finite, check_positive, check_range
from wan_mini.prompts import NEGATIVE
from wan_mini.scheduler import MAX_STEPS, FlowEuler, FlowUniPC
from wan_mini.vae import TILE_MULTIPLE, WanVAE
from wan_mini.video import to_tensor, to_uint8

progress_bar = partial(tqdm, disable=None)  # on a terminal; not in a log, where each turn would be kept
Timer = Callable[[str], AbstractContextManager[None]]  # timer("denoise") measures a block of code, as StageTimer does
VelocityFunction = Callable[[WanDiT, Tensor, Tensor, Tensor, Tensor, float], Tensor]  # as guided_velocity


@dataclass(frozen=True)
class SamplingConfig:
    """The options of sampling, for every method. Sec. is the FastVMT paper's; "release" is its published code."""

    steps: int = 50  # denoising steps (Sec. 4.1)
    shift: float = 7.0  # of the noise levels (release; the paper does not say)
    cfg: float = 5.8  # scale of classifier-free guidance (release; the paper does not say)
    negative: str = NEGATIVE  # prompt that classifier-free guidance leads away from
    strength: float = 1.0  # 1: start from Gaussian noise (paper); below 1: from the noised reference (release: 0.75)
    key: str = ""  # of the start noise, public text (noise.py); "": none
    vae_tile: int | None = None  # pixels, multiple of 32: encode and decode in tiles, less memory, not quite the same

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, MAX_STEPS)
        check_positive("shift", self.shift)
        check_range("cfg", self.cfg)
        check_positive("strength", self.strength, at_most=1)
        check_vae_tile(self.vae_tile)


def check_vae_tile(tile: int | None) -> None:
    """Raises UserError unless the VAE can work in tiles of this side in pixels; None: in whole frames."""
    if tile is not None and (tile < TILE_MULTIPLE or tile % TILE_MULTIPLE):
        raise UserError(f"vae_tile must be a positive multiple of {TILE_MULTIPLE} pixels or none, got {tile}")


@dataclass
class Transfer:
    """What a motion transfer gives; frames are None until they are decoded."""

    latents: Tensor  # (1,16,F,h,w) float32
    flows: tuple[Tensor, Tensor]  # of reference and result, (F-1,S,2) tokens from each latent frame to the next
    report: dict[str, Any]  # losses, gradients, ...: what goes into run.json
    frames: np.ndarray | None = None  # (T,H,W,3) uint8
    others: dict[str, np.ndarray] = field(default_factory=dict)  # more clips, each to be written as NAME.webp


class Guidance(Protocol):
    """A training-free method: it may change the latents before each denoising step.

    If it has an attribute `history`, that names what changes with the steps, JSON or float32: a journal keeps it, and
    the float32 tensors of its dictionary `state`, if it has one.
    """

    status: dict[str, str]  # shown behind the progress bar, such as {"loss": "0.12"}

    def before_step(self, index: int, latents: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
        """Return the latents (1,16,F,h,w) from which step `index` starts, at noise level sigma = timestep / 1000."""
        ...


class Journal(Protocol):
    """Where a run keeps what it has reached, so that a run that was stopped can go on (wan_mini/runs/journal.py)."""

    @property
    def reference(self) -> Tensor | None:
        """The reference's latents (1,16,F,h,w) on a CPU or where the run works, if an earlier run has them encoded."""
        ...

    def keep_reference(self, latents: Tensor) -> None:
        """Keep the reference's latents (1,16,F,h,w)."""
        ...

    def start(self, latents: Tensor, guidance: Guidance | None) -> tuple[int, Tensor]:
        """The first step that is not done yet, and the latents (1,16,F,h,w) before it; at step 0, those given."""
        ...

    def beside(self, suffix: str) -> Path:
        """A file for what a method keeps itself: it lasts as long as the state."""
        ...

    def keep(self, step: int, steps: int, latents: Tensor, guidance: Guidance | None) -> None:
        """Keep the latents (1,16,F,h,w) after `step` of `steps` steps."""
        ...


def no_timer(stage: str) -> AbstractContextManager[None]:
    """A Timer that measures nothing."""
    return nullcontext()


def guided_velocity(
    dit: WanDiT, latents: Tensor, timestep: Tensor, text: Tensor, negative_text: Tensor, cfg: float
) -> Tensor:
    """Velocity by classifier-free guidance, u + cfg (c - u): two passes, or one if cfg is 1.

    latents (1,16,F,h,w); timestep () in [0,1000]; text, negative_text (1,L,text_dim) -> (1,16,F,h,w) float32.
    Source: Ho & Salimans (arXiv 2207.12598).
    """
    timestep = timestep.reshape(1)  # () -> (1,)
    if cfg == 1:
        return dit(latents, timestep, text)
    ranks = getattr(dit, "ranks", OneProcess())  # any function of these arguments will do, too
    conditional, unconditional = ranks.each(partial(dit, latents, timestep), [text, negative_text])
    return unconditional + cfg * (conditional - unconditional)


@torch.no_grad()
def denoise(
    dit: WanDiT,
    latents: Tensor,
    scheduler: FlowEuler | FlowUniPC,
    text: Tensor,
    negative_text: Tensor,
    cfg: float,
    *,
    guidance: Guidance | None = None,
    velocity_of: VelocityFunction = guided_velocity,
    timer: Timer = no_timer,
    journal: Journal | None = None,
) -> Tensor:
    """Take latents from the scheduler's first noise level to its last.

    latents (1,16,F,h,w) float32, at scheduler.sigmas[0]; text, negative_text (1,L,text_dim); cfg: the scale of
    classifier-free guidance. Guidance changes the latents before each step; the timer sees stages "guide", "denoise".
    velocity_of: computes each step's velocity, such as savings.SavedVelocity.
    journal: says at which step to begin, with which latents, and is told of every step that is done.
    -> latents (1,16,F,h,w) float32, at scheduler.sigmas[-1].
    Raises FloatingPointError, which names the step, if latents stop being finite.
    """
    steps = len(scheduler.timesteps)
    first = 0
    if journal is not None:
        first, latents = journal.start(latents, guidance)
    with progress_bar(total=steps, initial=first, desc="denoise", unit="step") as bar:
        for index in range(first, steps):
            sigma = scheduler.sigmas[index]
            timestep = scheduler.timesteps[index]
            if guidance is not None:
                with timer("guide"):
                    latents = guidance.before_step(index, latents, sigma, timestep)
                bar.set_postfix(guidance.status)
            with timer("denoise"):
                velocity = velocity_of(dit, latents, timestep, text, negative_text, cfg)
                latents = scheduler.step(index, latents, velocity)
                check_finite(latents, index, steps)
                if journal is not None:
                    journal.keep(index + 1, steps, latents, guidance)
            bar.update()
    return latents


@torch.no_grad()
def encode(vae: WanVAE, clip: np.ndarray, *, tile: int | None = None, journal: Journal | None = None) -> Tensor:
    """Clip (T,H,W,3) uint8 -> latents (1,16,F,h,w) float32, on the VAE's device and in true float32.

    tile (pixels) bounds memory, see WanVAE. A journal that has the latents gives them, any other keeps them.
    Raises UserError if a journal's are of another clip.
    """
    device = next(vae.parameters()).device
    if journal is not None and journal.reference is not None:
        expected = latent_shape(*clip.shape[:3])
        if journal.reference.shape != expected:
            got = tuple(journal.reference.shape)
            raise UserError(f"the reference kept in the state must be {expected}, got {got}: start a new run")
        return journal.reference.to(device)
    with exact_float32(device):
        video = to_tensor(clip).to(device)  # (T,H,W,3) -> (1,3,T,H,W)
        latents = vae.encode(video, tile=tile, progress=partial(progress_bar, desc="encode"))
    if journal is not None:
        journal.keep_reference(latents)
    return latents


@torch.no_grad()
def decode(vae: WanVAE, latents: Tensor, *, tile: int | None = None, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Latents (1,16,F,h,w) -> frames (T,H,W,3) uint8, on the VAE's device.

    tile (pixels) bounds memory, see WanVAE. dtype bfloat16: convolutions and products are rounded to it.
    """
    device = next(vae.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        video = vae.decode(
            latents.to(device), tile=tile, progress=partial(progress_bar, desc="decode")
        )  # -> (1,3,T,H,W)
    return to_uint8(video)
