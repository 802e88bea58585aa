"""DeT (arXiv 2503.17350): in each block a small convolution over time beside the self-attention, trained on one clip.

Its tracking loss holds the predicted clean clip still along the tracks of points. It needs such tracks; the published
script trains without.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.dit import WanDiT
from wan_mini.errors import check_range
from wan_mini.peers.fit import FitConfig, Pass, Prediction, Stage, denoising_loss
from wan_mini.peers.plan import Clips, FrameSets, Plan

KERNEL = 3  # latent frames


@dataclass(frozen=True)
class DeTConfig(FitConfig):
    """Options of DeT; the defaults are its script's. Only the second of each pair of stages counts."""

    fit_steps: tuple[int, int] = (0, 500)
    fit_lr: tuple[float, float] = (0.0, 1e-5)
    fit_decay: tuple[float, float] = (0.0, 1e-4)
    rank: int = 128
    adapter_strength: float = 1.0  # of the convolutions when a video is made

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("rank", self.rank, 1)
        check_range("adapter_strength", self.adapter_strength)


class TemporalConv(nn.Module):
    """C -> rank -> C along time at each position, with GELU between; it adds nothing at first.

    The first kernel is drawn from N(0, 1 / 3C); the original's, from N(0, 1), makes pre-activations of size sqrt(3C).
    """

    def __init__(self, dim: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, dim, KERNEL, generator=generator) / (KERNEL * dim) ** 0.5)
        self.up = nn.Parameter(torch.zeros(dim, rank, KERNEL))

    def forward(self, x: Tensor) -> Tensor:
        """x (S,C,F), a place's frames in a row -> (S,C,F) in x's dtype."""
        hidden = F.gelu(F.conv1d(x, self.down.to(x.dtype), padding=KERNEL // 2))  # -> (S,rank,F)
        return F.conv1d(hidden, self.up.to(x.dtype), padding=KERNEL // 2)


class TemporalConvs(nn.ModuleList):
    """A TemporalConv for each block; `size` is S, the tokens of a frame."""

    def __init__(self, blocks: int, dim: int, rank: int, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        super().__init__(TemporalConv(dim, rank, generator) for _ in range(blocks))
        self.size = size
        self.strength = 1.0

    def set_strength(self, strength: float) -> None:
        """Scale what is added; 0 is the model without it."""
        self.strength = strength

    def hook(self, dit: WanDiT) -> Iterator[Any]:
        """Add to each self-attention's output, inside the block's gate."""
        for block, conv in zip(dit.blocks, self, strict=True):
            attention: Any = block.self_attn
            yield attention.register_forward_hook(self._add_to_output(conv))

    def _add_to_output(self, conv: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """A forward hook."""

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0][0].to(output.dtype).unflatten(0, (-1, self.size))  # (1,N,C) -> (F,S,C)
            moved = conv(x.permute(1, 2, 0)).permute(2, 0, 1)  # (F,S,C) -> (S,C,F) -> (F,S,C)
            return output + self.strength * moved.flatten(0, 1)[None]  # (F,S,C) -> (1,N,C)

        return add


def tracking_loss(clean: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    """Mean squared change of a predicted clean clip along tracks -> ().

    clean (1,16,F,h,w); positions (P,F,2) rows and columns in latents, rounded down; visible (P,F) bool: a step counts
    if its end is visible, and both ends are in the frame. There is no comparison with the truth.
    """
    frames = torch.arange(clean.shape[2], device=clean.device)
    last = torch.tensor(clean.shape[3:], device=clean.device) - 1
    whole = positions.floor().long()
    inside = ((whole >= 0) & (whole <= last)).all(-1)  # (P,F,2) -> (P,F)
    rows, columns = whole.clamp(min=torch.zeros_like(last), max=last).unbind(-1)  # (P,F) each
    along = clean[0][:, frames, rows, columns]  # (16,F,h,w) -> (16,P,F)
    squares = along.diff(dim=-1).square().mean(0)  # -> (P,F-1)
    counts = visible[:, 1:] & inside[:, 1:] & inside[:, :-1]
    return (squares * counts).sum() / counts.sum().clamp(min=1)


def tracked_loss(
    prediction: Prediction, positions: Tensor, visible: Tensor, weight: float = 0.1, highest: float = 0.4
) -> Tensor:
    """Denoising loss plus, up to noise level `highest`, the weighted tracking_loss of x0 = x - sigma v -> ()."""
    loss = denoising_loss(prediction)
    if prediction.sigma > highest:
        return loss
    clean = prediction.noised - prediction.sigma * prediction.velocity
    return loss + weight * tracking_loss(clean, positions, visible)


def frame_sets(config: DeTConfig, frames: int) -> FrameSets:
    """Video frames of the training clip: all."""
    return {"temporal": [range(frames)]}


def plan(
    dit: WanDiT,
    clips: Clips,
    text: Tensor,
    config: DeTConfig,
    seed: int,
    saved: Mapping[str, Any] | None = None,
    tracks: tuple[Tensor, Tensor] | None = None,
) -> Plan:
    """One stage, on the whole clip; tracks: positions and visible of tracking_loss, where they are known."""
    clip = clips["temporal"][0]
    _, height, width = dit.grid(clip)
    convs = TemporalConvs(dit.config.num_layers, dit.config.dim, config.rank, height * width, seed).to(clip.device)
    loss: Callable[[Prediction], Tensor] = denoising_loss
    if tracks is not None:
        loss = partial(tracked_loss, positions=tracks[0], visible=tracks[1])
    step = Pass("temporal", [clip], convs, loss=loss)
    stage = Stage("convolutions", [step], config.fit_steps[1], config.fit_lr[1], config.fit_decay[1], (0.9, 0.95))
    return Plan(nn.ModuleDict({"convolutions": convs}), [stage], (config.adapter_strength,))
