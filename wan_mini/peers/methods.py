"""The methods that train adapters on the reference, by name, and what a run with one of them costs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_mini.config import frames_of, latent_frames
from wan_mini.device.flops import forward_flops, training_flops
from wan_mini.device.memory import Gradient
from wan_mini.dit import WanDiT
from wan_mini.peers import det, followyourmotion, motiondirector, motioninversion
from wan_mini.peers.fit import FitConfig, gradients_of
from wan_mini.peers.plan import Clips, FrameSets, Plan


@dataclass(frozen=True)
class AdapterMethod:
    """A method that trains adapters: its options as its authors have them, and its functions."""

    config: FitConfig
    frame_sets: Callable[[Any, int], FrameSets]  # options, number of video frames -> training clips
    plan: Callable[..., Plan]  # dit, clips, text, options, seed, saved
    label: Callable[..., object] | None = None  # dit, latents, text, options, seed, blocks: reads the whole clip first


METHODS = {
    "fym": AdapterMethod(
        followyourmotion.FollowYourMotionConfig(),
        followyourmotion.frame_sets,
        followyourmotion.plan,
        followyourmotion.label_heads,
    ),
    "motiondirector": AdapterMethod(
        motiondirector.MotionDirectorConfig(), motiondirector.frame_sets, motiondirector.plan
    ),
    "motioninversion": AdapterMethod(
        motioninversion.MotionInversionConfig(), motioninversion.frame_sets, motioninversion.plan
    ),
    "det": AdapterMethod(det.DeTConfig(), det.frame_sets, det.plan),
}


def name_of(config: FitConfig) -> str:
    """The method whose options these are."""
    (name,) = (name for name, method in METHODS.items() if type(method.config) is type(config))
    return name


def trains(config: FitConfig) -> bool:
    """Whether there are adapters at all."""
    return any(config.fit_steps)


def unadapted(config: FitConfig) -> FitConfig:
    """The options without adapters."""
    return replace(config, fit_steps=(0, 0))


def plan_without_contents(config: FitConfig, dit: WanDiT, latents: Tensor, text: Tensor) -> Plan:
    """The plan for latents (1,16,F,h,w) of which only the shape counts; whatever the labels, adapters have a size."""
    method = METHODS[name_of(config)]
    clips: Clips = {"whole": [latents]}
    for name, sets in method.frame_sets(config, frames_of(latents.shape[2])).items():
        clips[name] = [latents[:, :, : latent_frames(len(sets[0]))]]
    every_head = torch.ones(dit.config.num_layers, dit.config.num_heads).tolist()
    saved = {"spatial_heads": every_head, "temporal_heads": every_head, "grid": dit.grid(latents)}
    return method.plan(dit, clips, text, config, 0, saved)


@cache  # equal options give the same function, by which gradient_bytes knows what it has counted
def gradient_of(config: FitConfig) -> Gradient | None:
    """The training as far as memory is concerned: one step of each stage, with its optimizer; None without any."""
    method = METHODS[name_of(config)]

    def gradient(dit: WanDiT, latents: Tensor, text: Tensor, recompute: str) -> None:
        if method.label is not None:
            method.label(dit, latents, text, config, 0, 1)
        for stage in plan_without_contents(config, dit, latents, text).stages:
            for step in stage.passes:
                gradients_of(dit, step, text, np.random.default_rng(0), 1.0, recompute)
            stage.optimizer().step()

    return gradient if trains(config) else None


def costs(config: FitConfig, dit: WanDiT, grid: tuple[int, int, int]) -> list[str]:
    """What training on a clip with this token grid costs, in lines for --dry-run: selective recomputation."""
    if not trains(config):
        return ["training     none"]
    frames, rows, columns = grid
    height, width = dit.config.patch_size[1] * rows, dit.config.patch_size[2] * columns
    with torch.device("meta"):
        latents = torch.zeros(1, dit.config.in_dim, frames, height, width)
        text = torch.zeros(1, dit.config.text_len, dit.config.text_dim)
    lines = []
    total = 0
    for stage in plan_without_contents(config, dit, latents, text).stages:
        for step in stage.passes:
            tokens = step.clips[0].shape[2] * rows * columns
            flops = training_flops(dit.config, tokens, "selective")
            total += stage.steps * flops
            parameters = sum(weight.numel() for weight in step.trained.parameters())
            what = f"{stage.steps} steps of {step.clips[0].shape[2]} latent frames, {flops / 1e12:,.1f} TFLOP each"
            lines.append(f"{step.name:12} {what}, {parameters / 1e6:,.1f} M parameters")
    labels = METHODS[name_of(config)].label is not None
    total += forward_flops(dit.config, frames * rows * columns) if labels else 0
    return [f"training     {name_of(config)}, {total / 1e12:,.1f} TFLOP in all, with selective recomputation", *lines]
