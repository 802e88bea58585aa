"""Models with random weights, made where they are needed: a benchmark reads no weights and downloads nothing."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvmt import MotionConfig
from wan_mini.config import (
    T2V_1_3B,
    TINY,
    TINY_UMT5,
    TINY_VAE,
    UMT5_XXL,
    WAN_VAE,
    ClipConfig,
    DiTConfig,
    UMT5Config,
    VAEConfig,
    latent_shape,
    token_grid,
)
from wan_mini.dit import WanDiT, keeps_float32
from wan_mini.load import Wan
from wan_mini.runs.request import load_preset
from wan_mini.tiny import demo
from wan_mini.tiny.training.grammar import CHARACTERS, tokenizer_json
from wan_mini.tokenizer import Tokenizer
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

REHEARSAL = "rehearsal"
SIZE_NAMES = ("tiny", "small", "1.3B", REHEARSAL)
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Size:
    """A model, and the clip and the transfer that it is measured on."""

    dit: DiTConfig
    vae: VAEConfig
    text_encoder: UMT5Config
    motion: MotionConfig
    clip: ClipConfig

    @property
    def latents(self) -> tuple[int, int, int, int, int]:
        """Shape of the clip's latents, (1,16,F,h,w)."""
        return latent_shape(self.clip.frames, self.clip.height, self.clip.width)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens of the clip, (F,H,W)."""
        return token_grid(self.clip.frames, self.clip.height, self.clip.width)

    @property
    def block(self) -> int:
        """The block whose queries and keys are read."""
        if self.motion.block is None:
            return (self.dit.num_layers - 1) // 2
        return self.motion.block


def named_size(name: str) -> Size:
    """One of SIZE_NAMES; "small" has heads as wide as the official ones, "rehearsal" is the quickest."""
    if name == "1.3B":
        return Size(T2V_1_3B, WAN_VAE, UMT5_XXL, MotionConfig(), ClipConfig())
    if name == "small":
        dit = DiTConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=12, text_dim=64)
        motion = MotionConfig(steps=10, window=11)
        return Size(dit, VAEConfig(dim=32), TINY_UMT5, motion, ClipConfig(height=240, width=416, frames=17))
    clip, motion = load_preset(demo.CHECKPOINT, MotionConfig())
    if name == REHEARSAL:
        clip = ClipConfig(height=64, width=96, frames=9)
        motion = replace(motion, steps=2, guidance_fraction=0.5, optim_steps=2, interval=1)
    return Size(TINY, TINY_VAE, TINY_UMT5, motion, clip)


def random_module(
    builder: Callable[[Any], Module],
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    in_float32: Callable[[str], bool] = lambda name: False,
) -> Module:
    """A module whose parameters are made on the device, in their dtype; those that in_float32 names in float32.

    Norms are 1, biases 0, weights as large as keeps a unit input's size.
    """
    with torch.device("meta"):
        module = builder(config)
    state = {}
    for name, like in module.state_dict().items():
        weight_dtype = torch.float32 if in_float32(name) else dtype
        if name.endswith("bias"):
            weight = torch.zeros(like.shape, device=device, dtype=weight_dtype)
        elif like.ndim == 1 or name.endswith("gamma"):
            weight = torch.ones(like.shape, device=device, dtype=weight_dtype)
        else:
            weight = torch.randn(like.shape, device=device, dtype=weight_dtype)
            weight.div_(prod(like.shape[1:]) ** 0.5)
        state[name] = weight
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def random_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> WanDiT:
    """A transformer as load_dit makes it."""
    return random_module(WanDiT, config, device, dtype, keeps_float32)


def random_wan(size: Size, name: str, device: torch.device, dtype: torch.dtype) -> Wan:
    """A whole model as load_wan makes it, with a tokenizer of single characters."""
    return Wan(
        dit=random_dit(size.dit, device, dtype),
        vae=random_module(WanVAE, size.vae, device, torch.float32),
        text_encoder=random_module(UMT5Encoder, size.text_encoder, device, dtype),
        tokenizer=Tokenizer(tokenizer_json(dict.fromkeys(CHARACTERS, -1.0))),
        name=f"random {name}",
    )


def random_inputs(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents (1,16,F,h,w), noise, and a text (1,L,text_dim) of full length: the same on every device."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(size.latents, generator=generator)
    noise = torch.randn(size.latents, generator=generator)
    text = torch.randn(1, size.dit.text_len, size.dit.text_dim, generator=generator)
    return latents.to(device), noise.to(device), text.to(device)
