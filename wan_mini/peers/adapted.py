"""A whole run with a method that trains adapters on the reference.

    config = METHODS["fym"].config
    result = transfer(wan, clip, "a fox runs", config, ref_prompt="a dog runs", seed=0)

It trains with the reference's own caption, so that the look of the clip goes to its words; the motion stays.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from wan_mini.device.memory import choose_recompute
from wan_mini.device.offload import on_device
from wan_mini.device.select import exact_float32
from wan_mini.load import Wan
from wan_mini.lora import Attachable, attached
from wan_mini.peers.adaptation import (
    Loaded,
    adapt,
    describe_training,
    encode_clips,
    read_adapters,
)
from wan_mini.peers.fit import FitConfig
from wan_mini.peers.methods import METHODS, gradient_of, name_of, trains
from wan_mini.peers.plan import FrameSets
from wan_mini.peers.training_free import clean_flow
from wan_mini.pipeline import Timer, Transfer, decode, denoise, no_timer
from wan_mini.prompts import encode_prompts
from wan_mini.scheduler import FlowEuler


@torch.no_grad()
def transfer(
    wan: Wan,
    clip: np.ndarray,
    prompt: str,
    config: FitConfig,
    *,
    ref_prompt: str,
    seed: int = 0,
    device: torch.device | str | None = None,
    offload_blocks: bool = False,
    recompute: str | None = None,
    timer: Timer = no_timer,
    on_latents: Callable[[Transfer], None] | None = None,
    save: Path | None = None,
    load: Path | None = None,
    check: bool = False,
) -> Transfer:
    """Train adapters on `clip`, whose caption is ref_prompt, and make a video of `prompt` with them.

    Other arguments as for fastvmt.transfer. save: file for the adapters, beside which a stopped training waits to go
    on; load: take those of a file instead. check: make the reference with its own caption too, as
    Transfer.others["rebuilt"]. Raises UserError, FloatingPointError.
    """
    device = wan.device if device is None else torch.device(device)
    loaded = None
    if load is not None and trains(config):
        config, loaded = read_adapters(wan, config, load)
    with timer("text"):
        prompts = [prompt, config.negative, "", ref_prompt]
        text, negative, empty, caption = encode_prompts(wan, prompts, device, offload_blocks=offload_blocks)
    with timer("encode"), on_device(wan.vae, device), exact_float32(device):
        clips = encode_clips(wan, clip, training_clips(config, len(clip), loaded), device, config.vae_tile)
    (reference,) = clips["whole"]
    start = start_latents(reference, config, seed)
    parts: list[nn.Module] = []
    report: dict[str, Any] = {"gradients": 0, "recompute": "none", "ref_prompt": ref_prompt}
    with ExitStack() as stack:
        with timer("move"):
            stack.enter_context(on_device(wan.dit, device, offload_blocks=offload_blocks))
        if trains(config):
            with timer("fit"):
                report["recompute"] = recompute or least_recompute(wan, reference, config, device, offload_blocks)
                options: Any = {"seed": seed, "recompute": report["recompute"], "loaded": loaded, "save": save}
                described = describe_training(wan, clip, ref_prompt)
                parts, figures = adapt(wan, clips, caption, config, described=described, **options)
                report |= figures
        sample = partial(sample_video, wan, start, parts, negative, config, timer)
        latents = sample(text)
        rebuilt = sample(caption) if check and trains(config) else None
        with timer("flows"):
            flows = clean_flow(wan.dit, reference, empty), clean_flow(wan.dit, latents, empty)
    result = Transfer(latents, flows, report)
    if on_latents is not None:
        on_latents(result)
    with timer("decode"), on_device(wan.vae, device):
        to_frames = partial(decode, wan.vae, tile=config.vae_tile, dtype=wan.dtype)
        result.frames = to_frames(latents)
        if rebuilt is not None:
            result.others["rebuilt"] = to_frames(rebuilt)
    return result


def training_clips(config: FitConfig, frames: int, loaded: Loaded | None) -> FrameSets:
    """Video frames of the clips to encode, beside all: what the method trains on, if it trains here."""
    if not trains(config):
        return {}
    sets = METHODS[name_of(config)].frame_sets(config, frames)
    if loaded is not None and "spatial" in sets:
        sets["spatial"] = []
    return sets


def start_latents(reference: Tensor, config: FitConfig, seed: int) -> Tensor:
    """Pure noise, unless strength is below 1: (1,16,F,h,w), the same as for every method."""
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed)).to(reference.device)
    sigma = FlowEuler(config.steps, config.shift, config.strength).sigmas[0]
    return (1 - sigma) * reference + sigma * noise


def least_recompute(wan: Wan, reference: Tensor, config: FitConfig, device: torch.device, offload_blocks: bool) -> str:
    """The least that training must recompute to fit into the device's memory, one of dit.RECOMPUTE."""
    gradient = gradient_of(config)
    assert gradient is not None
    return choose_recompute(wan.dit, reference.shape, gradient, device, offload_blocks=offload_blocks)


def sample_video(
    wan: Wan,
    start: Tensor,
    parts: Sequence[nn.Module],
    negative: Tensor,
    config: FitConfig,
    timer: Timer,
    text: Tensor,
) -> Tensor:
    """Latents (1,16,F,h,w) of a video, with the parts attached in both passes of classifier-free guidance."""
    scheduler = FlowEuler(config.steps, config.shift, config.strength)
    with attached(wan.dit, *cast(Sequence[Attachable], parts)):
        return denoise(wan.dit, start, scheduler, text, negative, config.cfg, timer=timer)
