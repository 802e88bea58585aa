"""Follow-Your-Motion (arXiv 2506.05207): adapters on the heads that attend in time, trained on a sparse clip.

Three stages: label the heads (heads.py); train adapters of the spatial ones on single frames; keep those, and train
adapters of the temporal ones on few frames that span the clip. A video is then made with the temporal adapters alone.
Wan's norm divides by the root mean square over all heads, so the heads stay coupled through it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.dit import WanDiT
from wan_mini.errors import UserError, check_choice, check_positive, check_range
from wan_mini.lora import lora_on
from wan_mini.peers.fit import FitConfig, Pass, Prediction, Stage, denoising_loss
from wan_mini.peers.heads import MASKS, RULES, relabel, similarities, temporal_heads
from wan_mini.peers.plan import Clips, FrameSets, Plan, single_frames


@dataclass(frozen=True)
class FollowYourMotionConfig(FitConfig):
    """Options of Follow-Your-Motion; the defaults are the paper's. Controls stand behind the options they change."""

    steps: int = 30
    cfg: float = 7.0
    shift: float = 5.0
    fit_steps: tuple[int, int] = (3000, 2000)
    fit_lr: tuple[float, float] = (1e-5, 1e-5)
    fit_decay: tuple[float, float] = (0.1, 0.99)
    rank: int = 128
    targets: str = "qkvo"
    heads: str = "labeled"  # controls: "all", "random" (as many), "swapped"
    ratio: float = 1.3  # of the similarities, beyond which a head is spatial
    rule: str = "paper"  # or "release", whose undecided heads are spatial
    mask: str = "band"  # or "exact": same frame, same position
    label_timestep: float = 900.0  # where heads are labeled: at high noise the labels belong to the model, not the clip
    sparse: str = "frames"  # every stride-th video frame; or "latents", every stride-th latent frame; "none": dense
    stride: int = 5
    rope: str = "aligned"  # positions of the sparse frames; "paper": i F / F_s; "none": i
    motion: str = "paper"  # loss of frame differences; "release" (blind to signs), "clean" (of the clean clip), "none"
    strengths: tuple[float, float] = (0.0, 0.5)  # of the spatial and the temporal adapters when a video is made

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("rank", self.rank, 1)
        check_choice("heads", self.heads, ("labeled", "all", "random", "swapped"))
        check_positive("ratio", self.ratio)
        check_choice("rule", self.rule, RULES)
        check_choice("mask", self.mask, MASKS)
        check_range("label_timestep", self.label_timestep, 0, 1000)
        check_choice("sparse", self.sparse, ("frames", "latents", "none"))
        check_range("stride", self.stride, 1)
        check_choice("rope", self.rope, ("aligned", "paper", "none"))
        check_choice("motion", self.motion, ("paper", "release", "clean", "none"))
        check_range("strengths", self.strengths)


def sparse_frames(frames: int, stride: int) -> range:
    """Video frames 0, stride, 2 stride, ... of `frames`, the last one included. Raises UserError unless 4m+1 remain."""
    if (frames - 1) % (4 * stride):
        possible = [str(k) for k in range(1, frames) if (frames - 1) % (4 * k) == 0]
        raise UserError(f"stride must leave 4m+1 of {frames} frames, got {stride}: try {', '.join(possible)}")
    return range(0, frames, stride)


def rope_times(frames: int, sparse: int, kind: str) -> tuple[float, ...]:
    """Temporal positions of `sparse` latent frames that span `frames` of them.

    "aligned": i (F-1)/(F_s-1), the last frame at F-1, where it lies; "paper": i F/F_s, which is what the paper's
    centered form comes to; "none": i.
    """
    scale = {"aligned": (frames - 1) / max(sparse - 1, 1), "paper": frames / sparse, "none": 1.0}[kind]
    return tuple(i * scale for i in range(sparse))


def frame_difference_loss(velocity: Tensor, target: Tensor, *, kind: str = "paper") -> Tensor:
    """How much the changes from frame to frame differ in direction, velocities (1,16,F,h,w) -> (); 0 if F is 1.

    "paper": 1 - cosine over all numbers of a frame, its mean over frames, in [0,2]. "release": 1 - cosine over time of
    absolute changes, its mean over all else: blind to signs, and about 0.3 for a random prediction.
    """
    if velocity.shape[2] == 1:
        return velocity.new_zeros(())
    change = velocity.diff(dim=2)  # (1,16,F,h,w) -> (1,16,F-1,h,w)
    true_change = target.diff(dim=2)
    if kind == "release":
        return 1 - F.cosine_similarity(change.abs(), true_change.abs(), dim=2).mean()
    change = change.transpose(1, 2).flatten(2)  # -> (1,F-1,16,h,w) -> (1,F-1,16hw)
    true_change = true_change.transpose(1, 2).flatten(2)
    return 1 - F.cosine_similarity(change, true_change, dim=-1).mean()


def motion_loss(prediction: Prediction, kind: str) -> Tensor:
    """Denoising loss plus the loss of frame differences -> ()."""
    loss = denoising_loss(prediction)
    if kind == "none":
        return loss
    velocity, target, noised, sigma, _ = prediction
    if kind == "clean":  # of x0 = x - sigma v, in which only motion changes
        return loss + frame_difference_loss(noised - sigma * velocity, noised - sigma * target)
    return loss + frame_difference_loss(velocity, target, kind=kind)


def frame_sets(config: FollowYourMotionConfig, frames: int) -> FrameSets:
    """Video frames of the training clips."""
    temporal: Sequence[int] = range(frames)
    if config.sparse == "frames":
        temporal = sparse_frames(frames, config.stride)
    elif config.sparse == "latents":
        sparse_frames(frames, config.stride)  # for its check alone
    return {"spatial": single_frames(frames), "temporal": [temporal]}


def label_heads(
    dit: WanDiT, latents: Tensor, text: Tensor, config: FollowYourMotionConfig, seed: int, blocks: int | None = None
) -> Tensor:
    """Similarities (L,M,2) of all heads, or of the first `blocks`, for the noised clip and its caption."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents.device)
    sigma = config.label_timestep / 1000
    noised = (1 - sigma) * latents + sigma * noise
    return similarities(dit, noised, torch.tensor([config.label_timestep]), text, MASKS[config.mask], blocks)


def plan(
    dit: WanDiT,
    clips: Clips,
    text: Tensor,
    config: FollowYourMotionConfig,
    seed: int,
    saved: Mapping[str, Any] | None = None,
) -> Plan:
    """Label the heads, unless `saved` has their labels, and say what is trained."""
    if saved is None:
        sims = label_heads(dit, clips["whole"][0], text, config, seed)
        labels = temporal_heads(sims, config.ratio, config.rule)
        spatial, temporal = relabel(labels, config.heads, seed)
        report = {"similarities": sims.tolist(), "labels": labels.int().tolist()}
        report |= {"spatial_heads": spatial.int().tolist(), "temporal_heads": temporal.int().tolist()}
    else:
        spatial = torch.tensor(saved["spatial_heads"], dtype=torch.bool)
        temporal = torch.tensor(saved["temporal_heads"], dtype=torch.bool)
        report = dict(saved)
    parts = nn.ModuleDict()
    for number, (name, heads) in enumerate({"spatial": spatial, "temporal": temporal}.items()):
        parts[name] = lora_on(dit, list(heads), rank=config.rank, targets=config.targets, seed=seed + number)
    whole = clips["whole"][0].shape[2]  # F
    training = [clip[:, :, :: config.stride] if config.sparse == "latents" else clip for clip in clips["temporal"]]
    times = rope_times(whole, training[0].shape[2], config.rope)
    still = Pass("spatial", clips["spatial"], parts["spatial"])
    loss = partial(motion_loss, kind=config.motion)
    moving = Pass("temporal", training, parts["temporal"], (parts["spatial"],), loss, times)
    stages = [
        Stage("spatial", [still], config.fit_steps[0], config.fit_lr[0], config.fit_decay[0]),
        Stage("temporal", [moving], config.fit_steps[1], config.fit_lr[1], config.fit_decay[1]),
    ]
    return Plan(parts, stages, config.strengths, report)
