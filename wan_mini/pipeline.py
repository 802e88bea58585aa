"""The sampling loop of the repository."""

from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wan_mini.device.offload import resident
from wan_mini.dit import WanDiT
from wan_mini.vae import WanVAE
from wan_mini.video import from_model


def check_finite(latents: Tensor, step: int, steps: int) -> None:
    """Raises FloatingPointError that names the step if latents hold NaN or infinity."""
    if not torch.isfinite(latents).all():
        hint = "try --dtype float32, a lower learning rate, or check the checkpoint with python -m wan_mini.inspect"
        raise FloatingPointError(f"latents are not finite after step {step + 1} of {steps}: {hint}")


def guided_velocity(dit: WanDiT, x: Tensor, timestep: Tensor, text: Tensor, negative: Tensor, cfg: float) -> Tensor:
    """Velocity by classifier-free guidance, u + cfg (c - u): two passes, or one where cfg is 1."""
    timestep = timestep.reshape(1)
    conditional = dit(x, timestep, text)
    if cfg == 1:
        return conditional
    unconditional = dit(x, timestep, negative)
    return unconditional + cfg * (conditional - unconditional)


@torch.no_grad()
def decode(vae: WanVAE, latents: Tensor, device: torch.device, tile: int | None = None) -> np.ndarray:
    """Latents (1,16,F,h,w) -> frames (T,H,W,3) uint8; tile (pixels) bounds memory, see WanVAE."""
    with resident(vae, device):
        return from_model(vae.decode(latents.to(device), tile=tile, progress=partial(tqdm, desc="decode")))
