"""A whole run with a method that trains adapters on the reference.

    config = METHODS["fym"].config
    result = transfer(wan, clip, "a fox runs", config, ref_prompt="a dog runs", seed=0)

It trains with the reference's own caption, so that the look of the clip goes to its words; the motion stays.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import cast

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
    Training,
    adapt,
    describe_training,
    encode_clips,
    read_adapters,
)
from wan_mini.peers.fit import FitConfig
from wan_mini.peers.flow import clean_flow
from wan_mini.peers.methods import METHODS, gradient_of, name_of, trains
from wan_mini.peers.plan import FrameSets
from wan_mini.pipeline import Journal, Timer, Transfer, decode, denoise, no_timer
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
    journal: Journal | None = None,
    save: Path | None = None,
    load: Path | None = None,
    check: bool = False,
) -> Transfer:
    """Train adapters on `clip`, whose caption is ref_prompt, and make a video of `prompt` with them.

    Other arguments and errors: as for fastvmt.transfer. save: file for the adapters, beside which a stopped training
    waits to go on; load: take those of a file. check: make the reference's own video too, Transfer.others["rebuilt"].
    """
    device = wan.device if device is None else torch.device(device)
    config, loaded = read_adapters(wan, config, load)
    with timer("text"):
        prompts = [prompt, config.negative, "", ref_prompt]
        text, negative, empty, caption = encode_prompts(wan, prompts, device, offload_blocks=offload_blocks)
    with timer("encode"), on_device(wan.vae, device), exact_float32(device):
        clips = encode_clips(wan, clip, training_clips(config, len(clip), loaded), device, config.vae_tile, journal)
    (reference,) = clips["whole"]
    with ExitStack() as stack:
        with timer("move"):
            stack.enter_context(on_device(wan.dit, device, offload_blocks=offload_blocks))
        with timer("fit"):
            recompute = recompute or least_recompute(wan, reference, config, device, offload_blocks)
            training = Training(seed, recompute, describe_training(wan, clip, ref_prompt), save, journal)
            parts, report = adapt(wan, clips, caption, config, training, loaded)
        sample = partial(sample_video, wan, reference, parts, negative, config, seed, timer)
        latents = sample(text, journal)
        others = {"rebuilt": sample(caption)} if check and trains(config) else {}
        with timer("flows"):
            flows = clean_flow(wan.dit, reference, empty), clean_flow(wan.dit, latents, empty)
    result = Transfer(latents, flows, {"ref_prompt": ref_prompt, "recompute": recompute, **report})
    if on_latents is not None:
        on_latents(result)
    with timer("decode"), on_device(wan.vae, device):
        result.frames = frames_of(wan, latents, config)
        result.others = {name: frames_of(wan, video, config) for name, video in others.items()}
    return result


def frames_of(wan: Wan, latents: Tensor, config: FitConfig) -> np.ndarray:
    """Latents (1,16,F,h,w) -> frames (T,H,W,3) uint8."""
    return decode(wan.vae, latents, tile=config.vae_tile, dtype=wan.dtype)


def training_clips(config: FitConfig, frames: int, loaded: Loaded | None) -> FrameSets:
    """Video frames of the clips to encode, beside all: what the method trains on, if it trains here."""
    if not trains(config):
        return {}
    sets = METHODS[name_of(config)].frame_sets(config, frames)
    if loaded is not None and "spatial" in sets:
        sets["spatial"] = []
    return sets


def least_recompute(wan: Wan, reference: Tensor, config: FitConfig, device: torch.device, offload_blocks: bool) -> str:
    """The least that training must recompute to fit into the device's memory, one of dit.RECOMPUTE."""
    gradient = gradient_of(config)
    if gradient is None:
        return "none"
    return choose_recompute(wan.dit, reference.shape, gradient, device, offload_blocks=offload_blocks)


def sample_video(
    wan: Wan,
    reference: Tensor,
    parts: Sequence[nn.Module],
    negative: Tensor,
    config: FitConfig,
    seed: int,
    timer: Timer,
    text: Tensor,
    journal: Journal | None = None,
) -> Tensor:
    """Latents (1,16,F,h,w) of a video, with the parts attached in both passes of classifier-free guidance."""
    scheduler = FlowEuler(config.steps, config.shift, config.strength)
    noise = wan.start_noise(reference.shape, seed, config.key).to(reference.device)
    start = scheduler.start_latents(reference, noise)
    with attached(wan.dit, *cast(Sequence[Attachable], parts)):
        return denoise(wan.dit, start, scheduler, text, negative, config.cfg, timer=timer, journal=journal)
