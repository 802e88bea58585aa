"""How a run fits into a device's memory: its stages are run on tensors without contents, and the living bytes counted.

What is counted are tensors, as a GPU's allocator sees them; what its libraries take for themselves (the CUDA context,
workspaces of convolutions) comes on top, and is not foreseen.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from wan_mini import dit as dit_module
from wan_mini.device.offload import OFFLOAD
from wan_mini.dit import FP32_PARTS, RECOMPUTE

PART = {"text": "text_encoder", "encode": "vae", "guide": "dit", "denoise": "dit", "decode": "vae"}  # at work
# The fastest first; with blocks elsewhere a backward that recomputes nothing would keep them all.
WAYS = [(offload, again) for offload in OFFLOAD for again in RECOMPUTE if offload != "blocks" or again != "none"]


@dataclass(frozen=True)
class Plan:
    """What stays on the device, what a backward computes again, and the GB (10^9 bytes) that each stage then needs."""

    offload: str
    recompute: str
    stages: dict[str, float]

    @property
    def peak(self) -> float:
        """GB of the largest stage."""
        return max(self.stages.values())


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside it make, and for how long something holds them."""

    def __init__(self):
        super().__init__()
        self.living: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given | self.living.keys():  # else a view
                self.note(x.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        place, size = storage._cdata, storage.nbytes()

        def free(_: weakref.ref) -> None:
            del self.living[place]
            self.now -= size

        self.living[place] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """dit.attention by the kernel that a GPU takes, which never holds N x N logits; without contents torch would."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,N,M,D) -> (B,M,N,D)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0].transpose(1, 2).flatten(2)  # -> (B,N,C)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that a call's tensors hold at once, its result included; the transformer with fused_attention."""
    with patch.object(dit_module, "attention", fused_attention), LivingBytes() as count:
        call()
    return count.peak


def weight_bytes(parts: Mapping[str, nn.Module], offload: str) -> dict[str, int]:
    """Weights on the device while each part is at work."""
    whole = {name: sum(p.nbytes for p in part.parameters()) for name, part in parts.items()}
    if offload == "none":
        return dict.fromkeys(parts, sum(whole.values()))
    if offload == "blocks":
        for name, part in parts.items():
            if blocks := getattr(part, "blocks", None):  # the VAE has none
                whole[name] -= sum(p.nbytes for p in blocks.parameters())
                whole[name] += min(3, len(blocks)) * sum(p.nbytes for p in blocks[0].parameters())
    return whole


def as_loaded(parts: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Give weightless parts (load.build_modules) the dtypes that load_wan gives them, and no gradients."""
    for name, part in parts.items():
        part.requires_grad_(False)
        for key, weight in part.named_parameters():
            if name == "text_encoder" or (name == "dit" and not any(island in key for island in FP32_PARTS)):
                weight.data = weight.data.to(dtype)


def stage_calls(parts: Mapping[str, nn.Module], config: Any, gradient: Callable[..., Any]) -> dict[str, Callable]:
    """What each stage of a transfer does at its largest, with inputs where the parts are; config is a MotionConfig.

    gradient(dit, latents, text, recompute) is one gradient of the guidance: a stage for each policy.
    """
    dit, vae, encoder = (parts[name] for name in ("dit", "vae", "text_encoder"))
    zeros = partial(torch.zeros, device=dit.patch_embedding.weight.device)
    length, latent_frames = dit.config.text_len, (config.frames - 1) // 4 + 1
    z = zeros(1, dit.config.in_dim, latent_frames, config.height // 8, config.width // 8)
    text = zeros(1, length, dit.config.text_dim)
    clip = zeros(1, 3, config.frames, config.height, config.width)

    def read() -> None:  # all but the token numbers, whose contents are looked at
        x = zeros(1, length, encoder.config.dim, dtype=encoder.norm.weight.dtype)
        for block in encoder.blocks:
            x = block(x, torch.zeros_like(x[:, None, None, :, 0]))  # (B,L,C) -> (B,1,1,L)

    calls = {"text": read, "encode": lambda: vae.encode(clip.clone(), tile=config.vae_tile)}
    calls |= {f"guide {again}": partial(gradient, dit, z, text, again) for again in RECOMPUTE if config.amf != "none"}
    calls["denoise"] = lambda: [dit(z, torch.tensor([500.0]), text) for _ in range(1 if config.cfg == 1 else 2)]
    return calls | {"decode": lambda: vae.decode(z, tile=config.vae_tile)}


@torch.no_grad()
def plans(parts: Mapping[str, nn.Module], config: Any, gradient: Callable[..., Any]) -> list[Plan]:
    """Every way to run a transfer and what it needs, the fastest first. Arguments as stage_calls; parts as_loaded."""
    calls = stage_calls(parts, config, gradient)
    peaks = {stage: peak_bytes(calls[stage]) for stage in tqdm(calls, desc="memory", unit="stage", leave=False)}
    found = []
    for offload, recompute in WAYS:
        weights, stages = weight_bytes(parts, offload), {}
        for stage, part in PART.items():
            if n := peaks.get(stage) or peaks.get(f"{stage} {recompute}"):
                stages[stage] = (weights[part] + n) / 1e9
        found.append(Plan(offload, recompute, stages))
    return found


def choose(plans: list[Plan], budget: float) -> Plan:
    """The fastest within 90 % of a budget in GB: the rest is for what is not foreseen. Raises ValueError if none is."""
    if fitting := [plan for plan in plans if plan.peak <= 0.9 * budget]:
        return fitting[0]
    leanest = min(plans, key=lambda plan: plan.peak)
    stage = max(leanest.stages, key=leanest.stages.get)
    advice = "--set vae_tile=256" if PART[stage] == "vae" else "fewer --frames or a smaller --size"
    least = leanest.peak / 0.9
    raise ValueError(f"--memory must be at least {least:.1f} here (to {stage}), got {budget:g}: try {advice}")


def free_memory(device: torch.device) -> int | None:
    """Memory of a GPU that new tensors may take; None for a CPU, which shares its memory with everything else."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, but unused
    return torch.cuda.mem_get_info(device)[0] + cached
