"""`--dry-run`: what a run would cost, from the sizes of a model's parts alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from wan_mini.config import ClipConfig, latent_shape, token_grid
from wan_mini.device.flops import forward_flops
from wan_mini.device.memory import MemoryPlan, estimate, memory_table
from wan_mini.pipeline import SamplingConfig
from wan_mini.runs.request import Method
from wan_mini.savings import sampling_passes


def plan_memory(
    method: Method, parts: Mapping[str, nn.Module], clip: ClipConfig, config: SamplingConfig, dtype: torch.dtype
) -> list[MemoryPlan]:
    """The memory of every way to run a transfer, for weightless parts."""
    return estimate(
        parts,
        dtype=dtype,
        video_shape=(1, 3, clip.frames, clip.height, clip.width),
        latent_shape=latent_shape(clip.frames, clip.height, clip.width),
        cfg_passes=1 if config.cfg == 1 else 2,
        vae_tile=config.vae_tile,
        gradient=method.gradient(config),
        gradient_stage=method.stage,
    )


def print_costs(
    method: Method, name: str, parts: Mapping[str, Any], clip: ClipConfig, config: SamplingConfig, dtype: torch.dtype
) -> None:
    """Print what a run would cost, from the sizes of the parts alone."""
    dit = parts["dit"]
    grid = token_grid(clip.frames, clip.height, clip.width)
    frames, rows, columns = grid
    tokens = frames * rows * columns
    counts = []
    for part, module in parts.items():
        millions = sum(p.numel() for p in module.parameters()) / 1e6
        counts.append(f"{part} {millions:,.1f} M")
    passes = sampling_passes(config)
    denoising = passes * forward_flops(dit.config, tokens)
    print(f"model        {name}: {', '.join(counts)}")
    print(f"clip         {clip.frames} frames of {clip.width}x{clip.height} at {clip.fps:g} a second")
    print(f"tokens       {frames} x {rows} x {columns} = {tokens}")
    for line in method.costs(config, dit, grid):
        print(line)
    print(f"denoising    {config.steps} steps, {passes} passes, {denoising / 1e12:,.1f} TFLOP")
    print(f"memory of a GPU in GB, weights in {dtype}, by what is offloaded and what a gradient recomputes:")
    print(memory_table(plan_memory(method, parts, clip, config, dtype)))
