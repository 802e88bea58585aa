"""The training-free peers by name, and a whole run with one of them.

The two lines that it takes:

    config = preset_of(folder, "moft")[1]
    result = transfer(wan, clip, prompt, config, seed=0)
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_mini.config import ClipConfig
from wan_mini.device.flops import forward_flops, gradient_flops
from wan_mini.device.memory import Gradient
from wan_mini.dit import WanDiT
from wan_mini.errors import check_choice
from wan_mini.load import Wan
from wan_mini.peers.config import PeerConfig
from wan_mini.peers.ditflow import DiTFlow, DiTFlowConfig
from wan_mini.peers.flowmotion import FlowMotion, FlowMotionConfig
from wan_mini.peers.guidance import PeerGuidance
from wan_mini.peers.moft import MOFT, MOFTConfig
from wan_mini.peers.motionclone import MotionClone, MotionCloneConfig
from wan_mini.peers.smm import SMM, SMMConfig
from wan_mini.pipeline import Transfer
from wan_mini.runs.cli import field_names, with_options
from wan_mini.runs.folder import read_preset
from wan_mini.transfer import transfer_with


@dataclass(frozen=True)
class Peer:
    """A training-free peer: its options at its authors' schedule, and its guidance."""

    config: PeerConfig
    guidance: type[PeerGuidance]


PEERS = {
    "ditflow": Peer(DiTFlowConfig(), DiTFlow),
    "smm": Peer(SMMConfig(), SMM),
    "moft": Peer(MOFTConfig(), MOFT),
    "motionclone": Peer(MotionCloneConfig(), MotionClone),
    "flowmotion": Peer(FlowMotionConfig(), FlowMotion),
}
BUDGETS = ("equal", "own")
SAMPLING = ("steps", "shift", "cfg", "negative")  # what a checkpoint's preset says for every method
# FastVMT's guidance (Sec. 4.1), where a preset does not say otherwise.
BUDGET = {"guidance_fraction": 0.2, "optim_steps": 10, "lr": [0.003, 0.002]}


def peer_of(config: PeerConfig) -> Peer:
    """The peer whose options these are."""
    (peer,) = (peer for peer in PEERS.values() if type(peer.config) is type(config))
    return peer


def preset_of(folder: Path | None, name: str, budget: str = "equal") -> tuple[ClipConfig, PeerConfig]:
    """A peer's options for a checkpoint, by its motion.json; without one, its authors'.

    budget "equal": the guided share, updates and rates of FastVMT's preset. "own": the authors' share and updates, with
    rates scaled until their sum over all updates is that of the preset, so that both can move a latent equally far.
    """
    check_choice("budget", budget, BUDGETS)
    preset = read_preset(folder)
    clip = with_options(ClipConfig(), preset.get("clip", {}), f"{folder}/motion.json: clip")
    motion = preset.get("motion", {})
    config = PEERS[name].config
    known = (*SAMPLING, "block", "tau")
    options = {key: value for key, value in motion.items() if key in known and key in field_names(config)}
    own = with_options(config, options, f"{folder}/motion.json: motion")
    if not motion:
        return clip, own
    shared = {"lr_over": "updates"} | {key: motion.get(key, default) for key, default in BUDGET.items()}
    equal = with_options(own, shared, f"{folder}/motion.json: motion")
    if budget == "equal":
        return clip, equal
    scale = equal.travel() / own.travel()
    return clip, replace(own, lr=(scale * own.lr[0], scale * own.lr[1]))


def transfer(wan: Wan, clip: np.ndarray, prompt: str, config: PeerConfig, **options: Any) -> Transfer:
    """Generate a video of `prompt` that moves like `clip`, by the peer whose options `config` holds.

    Other arguments, units and errors: those of wan_mini.transfer.transfer_with.
    """
    return transfer_with(peer_of(config).guidance, gradient_of(config), wan, clip, prompt, config, **options)


@cache  # equal options give the same function, by which gradient_bytes knows what it has counted
def gradient_of(config: PeerConfig) -> Gradient | None:
    """One gradient of the guidance as far as memory is concerned, None where none goes through the transformer."""

    def gradient(dit: WanDiT, latents: Tensor, text: Tensor, recompute: str) -> None:
        guidance = peer_of(config).guidance(dit, latents, latents, text, text, config, recompute)
        x = latents.detach().requires_grad_()
        with torch.enable_grad():
            features = guidance.features(x, torch.tensor(500.0), text)
            with torch.no_grad():
                target = guidance.target_of(features)
            torch.autograd.grad(guidance.distance(features, target), x)

    through_model = config.guided_steps > 0 and not isinstance(config, FlowMotionConfig)
    return gradient if through_model else None


def unguided(config: PeerConfig) -> PeerConfig:
    """The options without guidance."""
    return replace(config, guidance_fraction=0.0)


def costs(config: PeerConfig, dit: WanDiT, grid: tuple[int, int, int]) -> list[str]:
    """What guiding a clip with this token grid costs, in lines for --dry-run."""
    block, tokens = config.block_of(dit), math.prod(grid)
    updates = config.guided_steps * config.optim_steps
    head = f"guidance     {config.guided_steps} of {config.steps} steps"
    if isinstance(config, FlowMotionConfig):
        of_video = updates if config.velocity == "update" else config.guided_steps
        of_reference = config.guided_steps if config.reference == "noised" else 0
        flops = (of_video + of_reference) * forward_flops(dit.config, tokens)
        return [f"{head}, no gradient of the model", f"             {updates} updates, {flops / 1e12:,.1f} TFLOP"]
    gradients = updates
    if isinstance(config, MotionCloneConfig) and config.update == "score":
        gradients = config.guided_steps
    flops = gradients * gradient_flops(dit.config, tokens, block)
    flops += forward_flops(dit.config, tokens, block) * (config.guided_steps if config.reference == "noised" else 1)
    return [
        f"{head}, block {block} of {dit.config.num_layers}",
        f"             {gradients} gradients, {flops / 1e12:,.1f} TFLOP",
    ]
