"""How a run fits into a device's memory: its stages run on meta tensors, and peak.py counts the bytes that are alive.

What is counted are tensors, as a GPU's allocator sees them. What its libraries take for themselves (the CUDA context,
workspaces of convolutions) is not counted, so a tenth of every budget is left to it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wan_mini.build import set_weight_dtypes
from wan_mini.config import DiTConfig
from wan_mini.device.offload import OFFLOAD, block_owners, lay_out
from wan_mini.device.peak import peak_bytes
from wan_mini.dit import RECOMPUTE, WanDiT
from wan_mini.errors import UserError

# One gradient of a guidance, run for its memory alone: (dit, latents (1,16,F,h,w), text (1,L,text_dim), recompute).
Gradient = Callable[[WanDiT, Tensor, Tensor, str], object]
SHARE = 0.9  # of a budget that tensors may take; the rest is for what is not counted
COPIES = 3  # blocks on the device where blocks are offloaded: at work, before it, on its way
GB = 1e9


@dataclass(frozen=True)
class MemoryPlan:
    """One way to run, and the memory that it needs, in GB (10^9 bytes)."""

    offload: str  # what is not on the device, one of offload.OFFLOAD
    recompute: str  # what a backward computes again, one of dit.RECOMPUTE
    stages: dict[str, float]  # on the device, at the largest moment of each stage
    pinned: float = 0.0  # page-locked memory of the host

    @property
    def peak(self) -> float:
        """Device memory of the largest stage."""
        return self.stages[self.largest_stage]

    @property
    def largest_stage(self) -> str:
        """Name of the stage that needs the most device memory."""
        return max(self.stages, key=lambda name: self.stages[name])


@dataclass(frozen=True)
class Stage:
    """What one part of the model does at its largest."""

    name: str
    part: str  # the key of the module at work, whose weights must be on the device
    run: Callable[[str], object]  # called with one of dit.RECOMPUTE
    has_backward: bool = False  # else it does not matter what a backward recomputes


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(weight.nbytes for weight in module.parameters())


def blocks_of(part: nn.Module) -> list[nn.Module]:
    """The blocks of a part that can be offloaded one by one; the VAE has none."""
    return list(getattr(part, "blocks", []))


def weight_bytes(parts: Mapping[str, nn.Module], offload: str) -> dict[str, int]:
    """Bytes of weights on the device while each part is at work."""
    sizes = {}
    for name, part in parts.items():
        sizes[name] = module_bytes(part)
    if offload == "none":
        return dict.fromkeys(parts, sum(sizes.values()))
    if offload == "blocks":
        for name, part in parts.items():
            for block in blocks_of(part)[COPIES * len(block_owners(part)) :]:
                sizes[name] -= module_bytes(block)
    return sizes


def pinned_bytes(parts: Mapping[str, nn.Module], offload: str) -> int:
    """Page-locked bytes of the host at the largest: each part's blocks are pinned while the part is at work."""
    if offload != "blocks":
        return 0
    sizes = [0]
    for part in parts.values():
        buffers = [max(segment.stop for segment in lay_out(block).values()) for block in blocks_of(part)]
        sizes.append(sum(buffers))
    return max(sizes)


def sampling_stages(
    parts: Mapping[str, Any],
    *,
    video_shape: tuple[int, ...],
    latent_shape: tuple[int, ...],
    cfg_passes: int = 2,
    vae_tile: int | None = None,
    gradient: Gradient | None = None,
    gradient_stage: str = "guide",
) -> list[Stage]:
    """The stages of a run, with inputs where the parts are; arguments as for estimate."""
    dit, vae, encoder = parts["dit"], parts["vae"], parts["text_encoder"]
    device = dit.patch_embedding.weight.device
    length = dit.config.text_len
    video = torch.zeros(video_shape, device=device)
    latents = torch.zeros(latent_shape, device=device)
    text = torch.zeros(1, length, dit.config.text_dim, device=device)

    def encode_text(recompute: str) -> None:
        # All of UMT5Encoder.forward but the look at the token ids, which have no contents on the meta device.
        x = torch.zeros(1, length, encoder.config.dim, dtype=encoder.norm.weight.dtype, device=device)
        mask = x.new_zeros(1, 1, 1, length)
        for block in encoder.blocks:
            x = block(x, mask)

    # The same signature for all; only `guide` has a backward that could recompute.
    def encode(recompute: str) -> Tensor:
        return vae.encode(video.clone(), tile=vae_tile)

    def guide(recompute: str) -> object:
        assert gradient is not None
        return gradient(dit, latents, text, recompute)

    def denoise(recompute: str) -> list[Tensor]:
        return [dit(latents, torch.tensor([500.0]), text) for _ in range(cfg_passes)]

    def decode(recompute: str) -> Tensor:
        return vae.decode(latents, tile=vae_tile)

    stages = [Stage("text", "text_encoder", encode_text), Stage("encode", "vae", encode)]
    if gradient is not None:
        stages.append(Stage(gradient_stage, "dit", guide, has_backward=True))
    return [*stages, Stage("denoise", "dit", denoise), Stage("decode", "vae", decode)]


def measure_stages(stages: list[Stage]) -> dict[tuple[str, str], int]:
    """Peak bytes without weights, by (stage, recompute policy)."""
    peaks: dict[tuple[str, str], int] = {}
    for stage in tqdm(stages, desc="memory", unit="stage", leave=False):
        for recompute in RECOMPUTE:
            if stage.has_backward or recompute == RECOMPUTE[0]:
                peaks[stage.name, recompute] = peak_bytes(lambda: stage.run(recompute))  # noqa: B023 (called at once)
            else:
                peaks[stage.name, recompute] = peaks[stage.name, RECOMPUTE[0]]
    return peaks


def strategies() -> list[tuple[str, str]]:
    """All pairs (offload, recompute) worth a try, the fastest first.

    With blocks offloaded, a backward that recomputes nothing would keep a copy of each of them.
    """
    pairs = []
    for offload in OFFLOAD:
        for recompute in RECOMPUTE:
            if offload != "blocks" or recompute != "none":
                pairs.append((offload, recompute))
    return pairs


@torch.no_grad()
def estimate(
    parts: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype,
    video_shape: tuple[int, ...],
    latent_shape: tuple[int, ...],
    cfg_passes: int = 2,
    vae_tile: int | None = None,
    gradient: Gradient | None = None,
    gradient_stage: str = "guide",
) -> list[MemoryPlan]:
    """The memory of every way to sample a video, the fastest way first.

    parts: "dit", "vae" and "text_encoder" on the meta device; their weights become `dtype` as in load.load_wan.
    video_shape (1,3,T,H,W); latent_shape (1,16,F,h,w); cfg_passes: of the transformer in a step, 1 or 2; vae_tile: see
    WanVAE; gradient: of the guidance or the training, None without any; gradient_stage: the name of its stage.
    """
    set_weight_dtypes(parts, dtype)
    stages = sampling_stages(
        parts,
        video_shape=video_shape,
        latent_shape=latent_shape,
        cfg_passes=cfg_passes,
        vae_tile=vae_tile,
        gradient=gradient,
        gradient_stage=gradient_stage,
    )
    peaks = measure_stages(stages)
    plans = []
    for offload, recompute in strategies():
        weights = weight_bytes(parts, offload)
        gigabytes = {}
        for stage in stages:
            gigabytes[stage.name] = (weights[stage.part] + peaks[stage.name, recompute]) / GB
        plans.append(MemoryPlan(offload, recompute, gigabytes, pinned_bytes(parts, offload) / GB))
    return plans


def choose_plan(plans: list[MemoryPlan], budget_gb: float) -> MemoryPlan:
    """The first plan within SHARE of the budget. Raises UserError if there is none."""
    for plan in plans:
        if plan.peak <= SHARE * budget_gb:
            return plan
    leanest = min(plans, key=lambda plan: plan.peak)
    stage = leanest.largest_stage
    advice = "fewer frames or a smaller size"
    if stage in ("encode", "decode"):
        advice = "tiles (vae_tile=256) or " + advice
    least = leanest.peak / SHARE
    raise UserError(f"memory must be at least {least:.1f} GB here (to {stage}), got {budget_gb:g}: try {advice}")


def memory_table(plans: list[MemoryPlan]) -> str:
    """One line a plan below a heading: device memory by stage, and what the host must pin, in GB."""
    lines = [["offload", "recompute", *plans[0].stages, "pinned"]]
    for plan in plans:
        numbers = [f"{gigabytes:.2f}" for gigabytes in (*plan.stages.values(), plan.pinned)]
        lines.append([plan.offload, plan.recompute, *numbers])
    return "\n".join(" ".join(f"{cell:>9}" for cell in line) for line in lines)


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors may take on a GPU; None for a CPU, which shares its memory with everything else."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, but unused
    return torch.cuda.mem_get_info(device)[0] + cached


@lru_cache(maxsize=16)
@torch.no_grad()
def gradient_bytes(
    config: DiTConfig,
    dtype: torch.dtype,
    latent_shape: tuple[int, ...],
    gradient: Gradient,
    recompute: str,
    offload_blocks: bool,
) -> int:
    """Bytes that one gradient takes on a device where its other weights are; counted once, as it takes seconds."""
    with torch.device("meta"):
        dit = WanDiT(config)
        latents = torch.zeros(latent_shape)
        text = torch.zeros(1, config.text_len, config.text_dim)
    set_weight_dtypes({"dit": dit}, dtype)
    needed = peak_bytes(lambda: gradient(dit, latents, text, recompute))
    if offload_blocks:
        needed += sum(module_bytes(block) for block in blocks_of(dit)[:COPIES])
    return needed


def choose_recompute(
    dit: WanDiT,
    latent_shape: Sequence[int],
    gradient: Gradient,
    device: torch.device,
    *,
    offload_blocks: bool = False,
) -> str:
    """The first of dit.RECOMPUTE whose gradient fits into SHARE of the device's free memory, where that is known.

    latent_shape (1,16,F,h,w). Not "none" where blocks are offloaded: all their copies would be kept.
    """
    policies = RECOMPUTE[1:] if offload_blocks else RECOMPUTE
    free = free_memory(device)
    if free is None:
        return policies[0]
    dtype = dit.patch_embedding.weight.dtype
    index = 0
    while index < len(policies) - 1:
        needed = gradient_bytes(dit.config, dtype, tuple(latent_shape), gradient, policies[index], offload_blocks)
        if needed <= SHARE * free:
            break
        index += 1
    return policies[dit.ranks.agree(index)]
