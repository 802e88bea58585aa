"""MotionDirector (arXiv 2310.08465): adapters for appearance on single frames, and for motion on the whole clip.

Each step trains both: the spatial adapters on one frame, and the temporal ones, beside the spatial, on the clip with a
loss that counts motion more than appearance. A video is made with the temporal ones alone. The original has separate
spatial and temporal layers; Wan has not, so both kinds are on all heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.dit import WanDiT
from wan_mini.errors import check_range
from wan_mini.lora import lora_on
from wan_mini.peers.fit import FitConfig, Pass, Prediction, Stage, denoising_loss
from wan_mini.peers.plan import Clips, FrameSets, Plan, single_frames


@dataclass(frozen=True)
class MotionDirectorConfig(FitConfig):
    """Options of MotionDirector; the defaults are its code's. Only the second of each pair of stages counts."""

    fit_steps: tuple[int, int] = (0, 150)
    fit_lr: tuple[float, float] = (0.0, 5e-4)
    fit_decay: tuple[float, float] = (0.0, 1e-2)
    rank: int = 32
    targets: str = "qkvo"
    spatial_share: float = 0.8  # of the steps, at random, that train the spatial adapters and have them attached
    beta: float = 1.0  # how much the anchor frame is taken out in the debiased loss
    strengths: tuple[float, float] = (0.0, 1.0)  # of the spatial and the temporal adapters when a video is made

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("rank", self.rank, 1)
        check_range("spatial_share", self.spatial_share, 0, 1)
        check_range("beta", self.beta)
        check_range("strengths", self.strengths)


def debias(velocity: Tensor, anchor: int, beta: float) -> Tensor:
    """sqrt(beta^2 + 1) v_i - beta v_anchor for each latent frame i of v (1,16,F,h,w)."""
    return (beta**2 + 1) ** 0.5 * velocity - beta * velocity[:, :, anchor : anchor + 1]


def debiased_loss(prediction: Prediction, beta: float = 1.0) -> Tensor:
    """Denoising loss plus that of debiased velocities, with an anchor frame drawn at random -> ().

    Over all anchors at beta 1, an error without mean over time weighs 4, one that is constant in time 1.17.
    """
    velocity, target, _, _, rng = prediction
    anchor = int(rng.integers(velocity.shape[2]))
    return denoising_loss(prediction) + F.mse_loss(debias(velocity, anchor, beta), debias(target, anchor, beta))


def frame_sets(config: MotionDirectorConfig, frames: int) -> FrameSets:
    """Video frames of the training clips."""
    return {"spatial": single_frames(frames), "temporal": [range(frames)]}


def plan(
    dit: WanDiT,
    clips: Clips,
    text: Tensor,
    config: MotionDirectorConfig,
    seed: int,
    saved: Mapping[str, Any] | None = None,
) -> Plan:
    """One stage, whose steps have a pass for each kind of adapters."""
    heads = [torch.ones(dit.config.num_heads, dtype=torch.bool)] * dit.config.num_layers
    parts = nn.ModuleDict()
    for number, name in enumerate(("spatial", "temporal")):
        parts[name] = lora_on(dit, heads, rank=config.rank, targets=config.targets, seed=seed + number)
    still = Pass("spatial", clips["spatial"], parts["spatial"], share=config.spatial_share)
    loss = partial(debiased_loss, beta=config.beta)
    moving = Pass("temporal", clips["temporal"], parts["temporal"], (parts["spatial"],), loss)
    stage = Stage("both", [still, moving], config.fit_steps[1], config.fit_lr[1], config.fit_decay[1])
    return Plan(parts, [stage], config.strengths)
