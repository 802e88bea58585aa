"""MotionInversion (arXiv 2403.20193): learned embeddings in the self-attention, of time for q and k, of position for v.

An embedding of v for each position and frame ("full") becomes its changes from frame to frame when a video is made,
which takes out what is constant: the look of the clip. By default v has one for each position, which stays as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.dit import WanDiT
from wan_mini.errors import check_choice, check_range
from wan_mini.peers.fit import FitConfig, Pass, Prediction, Stage, denoising_loss
from wan_mini.peers.motiondirector import debiased_loss
from wan_mini.peers.plan import Clips, FrameSets, Plan

Grid = tuple[int, int, int]  # F, H, W


@dataclass(frozen=True)
class MotionInversionConfig(FitConfig):
    """Options of MotionInversion; the defaults are its code's. Only the second of each pair of stages counts."""

    fit_steps: tuple[int, int] = (0, 400)
    fit_lr: tuple[float, float] = (0.0, 0.02)
    fit_decay: tuple[float, float] = (0.0, 0.01)
    value: str = "place"  # v's embedding: a vector for each "place", for each place and frame ("full"), or "none"
    difference: bool = True  # make the video with changes of a "full" embedding
    debiased: bool = False  # train with MotionDirector's loss
    adapter_strength: float = 1.0  # of the embeddings when a video is made

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("value", self.value, ("place", "full", "none"))
        check_range("adapter_strength", self.adapter_strength)


def differences(embedding: Tensor) -> Tensor:
    """The first frame as it is, then the changes from frame to frame: (F,S,C) -> (F,S,C)."""
    return torch.cat([embedding[:1], embedding.diff(dim=0)])


def at_length(embedding: Tensor, frames: int) -> Tensor:
    """An embedding (F,...,C) for another number of frames, by linear interpolation over time."""
    if len(embedding) == frames:
        return embedding
    flat = embedding.flatten(1).T[None]  # (F,...,C) -> (1,...C,F)
    resized = F.interpolate(flat, size=frames, mode="linear", align_corners=True)
    return resized[0].T.unflatten(1, embedding.shape[1:])  # -> (frames,...,C)


class Embeddings(nn.Module):
    """What is added to the inputs of q and k, and of v, in each block; zero at first, float32."""

    def __init__(self, blocks: int, dim: int, grid: Grid, value: str):
        super().__init__()
        frames, height, width = grid
        self.grid = grid
        self.strength = 1.0
        self.differs = False
        self.qk = nn.Parameter(torch.zeros(blocks, frames, dim))
        self.v: nn.Parameter | None = None
        if value != "none":
            times = frames if value == "full" else 1
            self.v = nn.Parameter(torch.zeros(blocks, times, height * width, dim))

    def set_strength(self, strength: float) -> None:
        """Scale what is added; 0 is the model without it."""
        self.strength = strength

    def set_differences(self, differs: bool) -> None:
        """Add v's changes from frame to frame instead, if it has one for each."""
        self.differs = differs and self.v is not None and self.v.shape[1] > 1

    def of_qk(self, block: int, tokens: int) -> Tensor:
        """What q and k of a block get, (N,C), for clips of any number of frames."""
        size = self.grid[1] * self.grid[2]
        embedding = at_length(self.qk[block], tokens // size)  # (F,C)
        return self.strength * embedding.repeat_interleave(size, dim=0)  # -> (N,C), frame by frame

    def of_v(self, block: int, tokens: int) -> Tensor:
        """What v of a block gets, (N,C)."""
        assert self.v is not None
        frames = tokens // (self.grid[1] * self.grid[2])
        embedding = self.v[block]  # (F,S,C), or (1,S,C)
        if self.differs:
            embedding = differences(embedding)
        if len(embedding) == 1:
            embedding = embedding.expand(frames, -1, -1)
        return self.strength * at_length(embedding, frames).flatten(0, 1)  # (F,S,C) -> (N,C)

    def hook(self, dit: WanDiT) -> Iterator[Any]:
        """Add to the inputs of q, k and v, behind the norm and the modulation by the timestep."""
        for index, block in enumerate(dit.blocks):
            attention: Any = block.self_attn
            for layer in (attention.q, attention.k):
                yield layer.register_forward_pre_hook(_add_to_input(partial(self.of_qk, index)))
            if self.v is not None:
                yield attention.v.register_forward_pre_hook(_add_to_input(partial(self.of_v, index)))


def _add_to_input(of_tokens: Callable[[int], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    """A forward pre-hook."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        x = inputs[0]  # (1,N,C)
        return x + of_tokens(x.shape[1]).to(x.dtype)

    return add


def frame_sets(config: MotionInversionConfig, frames: int) -> FrameSets:
    """Video frames of the training clip: all."""
    return {"temporal": [range(frames)]}


def plan(
    dit: WanDiT,
    clips: Clips,
    text: Tensor,
    config: MotionInversionConfig,
    seed: int,
    saved: Mapping[str, Any] | None = None,
) -> Plan:
    """One stage, on the whole clip."""
    clip = clips["temporal"][0]
    grid = dit.grid(clip)
    if saved is not None:
        grid = tuple(saved["grid"])  # that the file was trained on
    embeddings = Embeddings(dit.config.num_layers, dit.config.dim, grid, config.value).to(clip.device)
    loss: Callable[[Prediction], Tensor] = debiased_loss if config.debiased else denoising_loss
    step = Pass("temporal", [clip], embeddings, loss=loss)
    stage = Stage("embeddings", [step], config.fit_steps[1], config.fit_lr[1], config.fit_decay[1])
    prepare = partial(embeddings.set_differences, config.difference)
    parts = nn.ModuleDict({"embeddings": embeddings})
    return Plan(parts, [stage], (config.adapter_strength,), {"grid": list(grid)}, prepare)
