"""A whole motion transfer with any guidance: text, encode, guided denoising, decode, each a named stage."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wan_mini.device.memory import Gradient, choose_recompute
from wan_mini.device.offload import on_device
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.load import Wan
from wan_mini.pipeline import (
    Guidance,
    Journal,
    SamplingConfig,
    Timer,
    Transfer,
    decode,
    denoise,
    encode,
    guided_velocity,
    no_timer,
)
from wan_mini.prompts import encode_prompts
from wan_mini.scheduler import FlowEuler


class MotionGuidance(Guidance, Protocol):
    """A guidance that follows a reference clip."""

    def clean_flow(self, latents: Tensor) -> Tensor:
        """Flow of a clean clip (1,16,F,h,w) from each latent frame to the next, (F-1,S,2) in tokens."""
        ...

    def report(self) -> dict[str, Any]:
        """What the guidance did, for run.json."""
        ...

    def close(self) -> None:
        """Leave the transformer as it was."""
        ...


class ReferenceGuidance:
    """What the guidances share that compare the latents with a reference: their inputs, and where they read."""

    def __init__(
        self,
        dit: WanDiT,
        reference: Tensor,
        noise: Tensor,
        text: Tensor,
        empty_text: Tensor,
        config: Any,
        recompute: str = "none",
    ):
        """reference, noise (1,16,F,h,w) latents; text, empty_text (1,L,text_dim); recompute: one of dit.RECOMPUTE.

        Raises UserError if there is one latent frame only.
        """
        self.dit = dit
        self.reference = reference
        self.noise = noise
        self.text = text
        self.empty_text = empty_text
        self.config = config
        self.recompute = recompute
        self.block: int = config.block_of(dit)
        self.grid: tuple[int, int, int] = dit.grid(reference)
        if self.grid[0] < 2:
            raise UserError(f"motion needs two latent frames, got {self.grid[0]}: give a clip of 5 frames or more")
        self.status: dict[str, str] = {}
        self.losses: list[list[float]] = []  # of each guided step, at each gradient
        self.prepare()

    def prepare(self) -> None:
        """What a method needs besides, or computes once."""

    def queries_keys(self, latents: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of the block, (1,N,M,D) each, for latents (1,16,F,h,w) and a timestep () in [0,1000]."""
        recompute = self.recompute if latents.requires_grad else "none"
        return self.dit(latents, timestep.reshape(1), text, qk_block=self.block, recompute=recompute)

    def close(self) -> None:
        """Leave the transformer as it was: nothing to undo where it is only read."""


# dit; reference and noise, (1,16,F,h,w) each; text and empty text, (1,L,text_dim) each; options; one of dit.RECOMPUTE
MakeGuidance = Callable[[WanDiT, Tensor, Tensor, Tensor, Tensor, Any, str], MotionGuidance]


@torch.no_grad()
def transfer_with(
    make_guidance: MakeGuidance,
    gradient: Gradient | None,
    wan: Wan,
    clip: np.ndarray,
    prompt: str,
    config: SamplingConfig,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    offload_blocks: bool = False,
    recompute: str | None = None,
    timer: Timer = no_timer,
    on_latents: Callable[[Transfer], None] | None = None,
    journal: Journal | None = None,
) -> Transfer:
    """Generate a video of `prompt` that moves like `clip`, by a method's guidance.

    gradient: one of the guidance's, for its memory, or None. clip (T,H,W,3) uint8, T = 4k+1, H and W multiples of 16.
    device: where `wan` works (where it is). offload_blocks: keep there only blocks at work. recompute: of dit.RECOMPUTE
    (the least that fits). on_latents gets the undecoded result. Raises UserError on wrong sizes, FloatingPointError.
    """
    device = wan.device if device is None else torch.device(device)
    with timer("text"):
        prompts = [prompt, config.negative, ""]
        text, negative_text, empty_text = encode_prompts(wan, prompts, device, offload_blocks=offload_blocks)
    with timer("encode"), on_device(wan.vae, device):
        reference = encode(wan.vae, clip, tile=config.vae_tile, journal=journal)  # (T,H,W,3) -> (1,16,F,h,w)
    noise = wan.start_noise(reference.shape, seed, config.key).to(device)
    scheduler = FlowEuler(config.steps, config.shift, config.strength)
    latents = scheduler.start_latents(reference, noise)
    with ExitStack() as stack:
        with timer("move"):
            stack.enter_context(on_device(wan.dit, device, offload_blocks=offload_blocks))
        with timer("guide"):
            if recompute is None and gradient is not None:
                recompute = choose_recompute(wan.dit, reference.shape, gradient, device, offload_blocks=offload_blocks)
            guidance = make_guidance(wan.dit, reference, noise, text, empty_text, config, recompute or "none")
        hooks: dict[str, Any] = {"guidance": guidance, "timer": timer, "journal": journal}
        hooks["velocity_of"] = getattr(guidance, "velocity_of", guided_velocity)
        with closing(guidance):
            latents = denoise(wan.dit, latents, scheduler, text, negative_text, config.cfg, **hooks)
        with timer("flows"):
            flows = guidance.clean_flow(reference), guidance.clean_flow(latents)
    result = Transfer(latents, flows, guidance.report())
    if on_latents is not None:
        on_latents(result)
    with timer("decode"), on_device(wan.vae, device):
        result.frames = decode(wan.vae, latents, tile=config.vae_tile, dtype=wan.dtype)
    return result
