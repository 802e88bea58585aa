"""DiTFlow (arXiv 2412.07776): the motion flow of all pairs of frames, where the reference moves.

The target is hard: where each token's best match lies in each frame. A token at rest asks for nothing. In guided steps
the reference's keys and values replace the video's own in the first block. The published code works for 21 to 24 latent
frames only; this one for any number.
"""

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wan_mini.dit import Block, WanDiT
from wan_mini.errors import check_choice, check_positive, check_range
from wan_mini.peers.config import PeerConfig
from wan_mini.peers.flow import displacement
from wan_mini.peers.guidance import AttentionGuidance


@dataclass(frozen=True)
class DiTFlowConfig(PeerConfig):
    """Options of DiTFlow; the schedule is the published code's."""

    tau: float = 2.0  # factor of the heads' mean logits (published code)
    target: str = "hard"  # the best match in the reference, or "soft", the same mean as for the video
    moved_only: bool = True  # only tokens that move in the reference count
    inject: tuple[int, ...] = (0,)  # blocks whose keys and values become the reference's in guided steps; (): none

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tau", self.tau)
        check_choice("target", self.target, ("hard", "soft"))
        check_range("inject", self.inject)


class DiTFlow(AttentionGuidance):
    """Lowers the squared distance of the flows of all F x F ordered pairs of frames, self and backward included."""

    handles: tuple[RemovableHandle, ...] = ()

    def target_of(self, features: tuple[Tensor, Tensor]) -> Tensor:
        """Flow of the reference, (F,F,S,2) in tokens."""
        return displacement(*features, self.grid, tau=self.config.tau, hard=self.config.target == "hard")

    def distance(self, features: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """Distance of the flows, see flow_distance."""
        flow = displacement(*features, self.grid, tau=self.config.tau)
        return flow_distance(target, flow, moved_only=self.config.moved_only)

    def before_step(self, index: int, latents: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
        """As for every peer; the injected keys and values stay for the step's own passes, until the next call."""
        self.close()
        if index >= self.config.guided_steps:
            return latents
        target = self.target_at(sigma, timestep)  # before anything is injected
        blocks = self.config.inject
        if blocks:
            stored = stored_keys_values(self.dit, blocks, self.noised(sigma), timestep, self.text)
            self.handles = replace_keys_values(self.dit, blocks, stored)
        loss_fn = partial(self.loss, timestep=timestep, target=target)
        return self.optimize(index, latents, loss_fn)

    def close(self) -> None:
        """Remove the hooks that inject."""
        for handle in self.handles:
            handle.remove()
        self.handles = ()


def flow_distance(reference: Tensor, flow: Tensor, *, moved_only: bool = True) -> Tensor:
    """Mean squared difference of flows (F,F,S,2), both coordinates, over the tokens that the reference moves -> ().

    0 where nothing moves in the reference; the published code gives NaN there.
    """
    error = (reference - flow).square().mean(-1)  # (F,F,S,2) -> (F,F,S)
    counted = torch.ones_like(error)
    if moved_only:
        counted = (reference != 0).any(-1).to(error.dtype)  # (F,F,S,2) -> (F,F,S)
    return (counted * error).sum() / counted.sum().clamp(min=1)


def keys_values(dit: WanDiT, blocks: tuple[int, ...]) -> list[nn.Module]:
    """The layers that make keys and values in these blocks' self-attention."""
    layers: list[nn.Module] = []
    for index in blocks:
        check_range("inject", index, 0, len(dit.blocks) - 1)
        attention = cast(Block, dit.blocks[index]).self_attn
        layers += [attention.k, attention.v]
    return layers


@torch.no_grad()
def stored_keys_values(
    dit: WanDiT, blocks: tuple[int, ...], latents: Tensor, timestep: Tensor, text: Tensor
) -> list[Tensor]:
    """Outputs (1,N,C) of keys_values' layers in one pass, before norm and RoPE, which depend on them alone."""
    stored: list[Tensor] = []
    handles = []
    for layer in keys_values(dit, tuple(sorted(blocks))):
        handles.append(layer.register_forward_hook(lambda module, inputs, output: stored.append(output)))
    behind = max(blocks) + 1
    try:
        dit(latents, timestep.reshape(1), text, qk_block=behind if behind < len(dit.blocks) else None)
    finally:
        for handle in handles:
            handle.remove()
    return stored


def replace_keys_values(dit: WanDiT, blocks: tuple[int, ...], stored: list[Tensor]) -> tuple[RemovableHandle, ...]:
    """Let keys_values' layers return stored tensors, until the handles are removed."""
    handles = []
    for layer, tensor in zip(keys_values(dit, tuple(sorted(blocks))), stored, strict=True):
        handles.append(layer.register_forward_hook(partial(_instead, tensor)))
    return tuple(handles)


def _instead(stored: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook: the stored tensor in place of the output."""
    return stored
