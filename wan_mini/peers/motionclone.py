"""MotionClone (arXiv 2406.05338): the largest entries of temporal attention, as a map from frames to frames.

A transformer with full attention has no temporal map, so one is defined: at each position and for each head, the
softmax over the frames of that position's own queries and keys. The diagonal, which says nothing, is left out.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from wan_mini.errors import check_choice, check_range
from wan_mini.peers.config import PeerConfig
from wan_mini.peers.flow import Grid
from wan_mini.peers.guidance import AttentionGuidance

# Where the published code reads its reference: t = 400 of 1000, an alpha_bar of 0.290, whose signal-to-noise ratio a
# rectified flow has at this noise level.
PUBLISHED_SIGMA = 0.61


@dataclass(frozen=True)
class MotionCloneConfig(PeerConfig):
    """Options of MotionClone; the published code guides 30 to 40 % of the steps, by a score update."""

    REFERENCES: ClassVar[tuple[str, ...]] = ("once", "clean", "noised")

    guidance_fraction: float = 0.4
    reference: str = "once"  # noised to PUBLISHED_SIGMA, read once
    update: str = "adam"  # as the other peers, or "score": one gradient a step, added to the sampler's step
    score_weight: float = 2000.0  # of the score update (published code)
    top: int = 1  # entries kept of each row
    diagonal: bool = False  # whether a frame's attention to itself counts

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("update", self.update, ("adam", "score"))
        check_range("score_weight", self.score_weight)
        check_range("top", self.top, 1)

    @property
    def reference_sigma(self) -> float | None:
        """Noise level at which the reference is read once; None: at that of each step."""
        return PUBLISHED_SIGMA if self.reference == "once" else super().reference_sigma


class Target(NamedTuple):
    """The largest entries of the reference's rows, (S,M,F,top) each."""

    values: Tensor
    frames: Tensor  # which frame each entry is of


class MotionClone(AttentionGuidance):
    """Lowers the squared difference of attention at the entries that are largest in the reference."""

    history = (*AttentionGuidance.history, "pending", "self_share")
    self_share = 0.0  # of the reference's largest entries, how many are a frame's own
    pending: Tensor | None = None  # score update: what the last step still has to subtract, but for its end's sigma

    def target_of(self, features: tuple[Tensor, Tensor]) -> Target:
        """The reference's largest entries."""
        maps = temporal_attention(*features, self.grid, diagonal=self.config.diagonal)
        target = Target(*maps.topk(min(self.config.top, maps.shape[-1]), dim=-1))
        own = torch.arange(self.grid[0], device=maps.device)[:, None]  # (F,1)
        if not maps.is_meta:
            self.self_share = (target.frames == own).float().mean().item()
        return target

    def distance(self, features: tuple[Tensor, Tensor], target: Target) -> Tensor:
        """Mean squared difference at the target's entries -> ()."""
        maps = temporal_attention(*features, self.grid, diagonal=self.config.diagonal)
        return entry_distance(maps, target)

    def before_step(self, index: int, latents: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
        """As for every peer, or the score update.

        That one shifts what the sampler's step arrives at: x' - weight ramp sigma sigma' gradient, with the gradient at
        the step's start. So it is subtracted at the next call, whose sigma is sigma'; behind the last step that is 0.
        """
        if self.config.update == "adam":
            return super().before_step(index, latents, sigma, timestep)
        if self.pending is not None:
            shift = sigma * self.pending
            self.status["step/x"] = f"{(shift.norm() / latents.norm()).item():.2g}"
            latents = latents - shift
            self.pending = None
        if index < self.config.guided_steps:
            loss_fn = self.loss_at(latents, sigma, timestep)
            x = latents.detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_fn(x)
                (gradient,) = torch.autograd.grad(loss, x)
            self.record([loss.item()], [gradient.norm().item()])
            self.pending = self.config.score_weight * ramp(index, self.config.guided_steps) * sigma * gradient
        return latents

    def report(self) -> dict[str, Any]:
        """With the share of the reference's largest entries that lie on the diagonal."""
        return super().report() | {"self_share": self.self_share, "update": self.config.update}


def temporal_attention(q: Tensor, k: Tensor, grid: Grid, *, diagonal: bool = False) -> Tensor:
    """Softmax over the frames at the same position, head by head: q, k (1,N,M,D) -> (S,M,F,F) float32, rows sum to 1.

    diagonal False: a frame does not see itself.
    """
    shape = (grid[0], grid[1] * grid[2])
    queries = q[0].float().unflatten(0, shape).permute(1, 2, 0, 3)  # (1,N,M,D) -> (F,S,M,D) -> (S,M,F,D)
    keys = k[0].float().unflatten(0, shape).permute(1, 2, 3, 0)  # (1,N,M,D) -> (F,S,M,D) -> (S,M,D,F)
    logits = queries @ keys / q.shape[-1] ** 0.5  # -> (S,M,F,F)
    if not diagonal:
        own = torch.eye(grid[0], dtype=torch.bool, device=q.device)
        logits = logits.masked_fill(own, float("-inf"))
    return logits.softmax(-1)


def entry_distance(maps: Tensor, target: Target) -> Tensor:
    """Mean squared difference of maps (S,M,F,F) from the target's entries -> ()."""
    return (maps.gather(-1, target.frames) - target.values).square().mean()


def ramp(index: int, steps: int) -> float:
    """Weight of guided step `index` of `steps`: rises over the first fifth and falls over the last, in (0, 1]."""
    length = max(1, steps // 5)
    return min(1.0, (index + 1) / length, (steps - index) / length)
