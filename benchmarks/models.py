"""Models with random weights, made where they are needed: a benchmark reads no file and downloads nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from fastvmt import TINY_MOTION, MotionConfig
from wan_mini.config import (
    T2V_1_3B,
    TINY,
    TINY_UMT5,
    TINY_VAE,
    UMT5_XXL,
    WAN_VAE,
    DiTConfig,
    UMT5Config,
    VAEConfig,
)
from wan_mini.dit import WanDiT, keeps_float32
from wan_mini.layouts import detect, rename


@dataclass(frozen=True)
class Size:
    """A model and the transfer it is measured on."""

    dit: DiTConfig
    vae: VAEConfig
    text_encoder: UMT5Config
    motion: MotionConfig

    @property
    def latents(self) -> tuple[int, ...]:
        """Shape of the clip's latents."""
        c = self.motion
        return 1, self.dit.in_dim, (c.frames - 1) // 4 + 1, c.height // 8, c.width // 8

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens of the clip."""
        return tuple(n // p for n, p in zip(self.latents[2:], self.dit.patch_size))


SIZES = {
    "tiny": Size(TINY, TINY_VAE, TINY_UMT5, TINY_MOTION),
    "small": Size(  # heads as wide as the official ones, a few seconds on a CPU
        DiTConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=12, text_dim=64),
        VAEConfig(dim=32),
        TINY_UMT5,
        MotionConfig(height=240, width=416, frames=17, steps=10, window=11),
    ),
    "1.3B": Size(T2V_1_3B, WAN_VAE, UMT5_XXL, MotionConfig()),
}


def random_module(
    builder: Callable,
    config,
    device: torch.device,
    dtype: torch.dtype,
    in_float32: Callable[[str], bool] = lambda name: False,
) -> nn.Module:
    """A module whose parameters are made on the device, in their dtype; those that in_float32 names in float32.

    Norms are 1, biases 0, weights as large as keeps a unit input's size.
    """
    with torch.device("meta"):
        module = builder(config)
    state = {}
    for name, like in module.state_dict().items():
        where = {"device": device, "dtype": torch.float32 if in_float32(name) else dtype}
        if name.endswith("bias"):
            state[name] = torch.zeros(like.shape, **where)
        elif like.ndim == 1 or name.endswith("gamma"):
            state[name] = torch.ones(like.shape, **where)
        else:
            state[name] = torch.randn(like.shape, **where).div_(prod(like.shape[1:]) ** 0.5)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def random_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> WanDiT:
    """A transformer as load_dit makes it."""
    return random_module(WanDiT, config, device, dtype, keeps_float32)


def random_inputs(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents, noise, and a text that fills its length: the same on every device."""
    random = torch.Generator().manual_seed(0)
    shapes = size.latents, size.latents, (1, size.dit.text_len, size.dit.text_dim)
    return tuple(torch.randn(shape, generator=random).to(device) for shape in shapes)


def diffusers_class(name: str) -> type[nn.Module] | None:
    """A model of diffusers by its name; None where there is no diffusers."""
    try:
        import diffusers  # here, as it takes seconds, and not every machine has it
    except ImportError:
        return None
    return getattr(diffusers, name)


def copy_weights(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Diffusers' module with our weights, in the dtypes that its from_pretrained would give them."""
    kept = set(theirs._keep_in_fp32_modules or ())
    names = rename(detect(theirs.state_dict()), theirs.state_dict())  # {their name: ours}
    weights = ours.state_dict()
    state = {
        name: weights[same].to(torch.float32 if kept & set(name.split(".")) else dtype) for name, same in names.items()
    }
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.eval().requires_grad_(False)
