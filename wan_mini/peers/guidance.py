"""What the training-free peers share: the guided step, and the two places where they read the model.

A peer names what it reads (`features`), what of it the reference must have (`target_of`), and how far another video is
from that (`distance`). The guided step is the same for all: Adam on the latents, then the ordinary denoising step.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.experts import Experts
from wan_mini.peers.flow import clean_flow
from wan_mini.transfer import ReferenceGuidance


class PeerGuidance(ReferenceGuidance):
    """A training-free peer, which is a wan_mini.pipeline.Guidance: Adam lowers `distance` before each guided step."""

    history: tuple[str, ...] = ("losses", "gradient_norms")

    def prepare(self) -> None:
        """Nothing is read yet."""
        self.gradient_norms: list[list[float]] = []
        self.once: Any = None  # the target, where the reference is read once

    def features(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Any:
        """What the method reads, differentiable, for latents (1,16,F,h,w) and a timestep () in [0,1000]."""
        raise NotImplementedError

    def target_of(self, features: Any) -> Any:
        """What the reference's features ask of another video; no gradient."""
        raise NotImplementedError

    def distance(self, features: Any, target: Any) -> Tensor:
        """How far features are from the target -> ()."""
        raise NotImplementedError

    def before_step(self, index: int, latents: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
        """Latents (1,16,F,h,w) nearer to the reference's motion; after the guided steps, unchanged."""
        if index >= self.config.guided_steps:
            return latents
        return self.optimize(index, latents, self.loss_at(latents, sigma, timestep))

    def optimize(self, index: int, latents: Tensor, loss_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """The updates of guided step `index`."""
        latents, losses, norms = adam_updates(latents, loss_fn, self.config.rates(index))
        self.record(losses, norms)
        return latents

    def record(self, losses: list[float], norms: list[float]) -> None:
        """Keep what a guided step did, for the progress bar and run.json."""
        self.losses.append(losses)
        self.gradient_norms.append(norms)
        self.status = {"loss": f"{losses[-1]:.4g}"}

    def loss_at(self, latents: Tensor, sigma: Tensor, timestep: Tensor) -> Callable[[Tensor], Tensor]:
        """The loss of latents at a guided step, which begins with `latents` at noise level sigma."""
        return partial(self.loss, timestep=timestep, target=self.target_at(sigma, timestep))

    def loss(self, latents: Tensor, timestep: Tensor, target: Any) -> Tensor:
        """Distance of latents (1,16,F,h,w) from the target -> ()."""
        return self.distance(self.features(latents, timestep, self.text), target)

    @torch.no_grad()
    def target_at(self, sigma: Tensor, timestep: Tensor) -> Any:
        """The target at noise level sigma = timestep / 1000; the reference is read without a prompt."""
        fixed = self.config.reference_sigma
        if fixed is None:
            return self.target_of(self.features(self.noised(sigma), timestep, self.empty_text))
        if self.once is None:
            level = torch.tensor(fixed)
            self.once = self.target_of(self.features(self.noised(level), 1000 * level, self.empty_text))
        return self.once

    def noised(self, sigma: Tensor) -> Tensor:
        """The reference with the start's noise, at noise level sigma; at 0 the reference itself, bit by bit."""
        return (1 - sigma) * self.reference + sigma * self.noise

    def clean_flow(self, latents: Tensor) -> Tensor:
        """Flow of a clean clip (1,16,F,h,w) from each latent frame to the next, (F-1,S,2) in tokens."""
        return clean_flow(self.dit, latents, self.empty_text)

    def report(self) -> dict[str, Any]:
        """What the guidance did, for run.json."""
        gradients = sum(len(losses) for losses in self.losses)
        report: dict[str, Any] = {"peer": type(self).__name__, "losses": self.losses, "gradients": gradients}
        report |= {"gradient_norms": self.gradient_norms, "travel": self.config.travel()}
        report |= {"block": self.block, "recompute": self.recompute}
        return report


class AttentionGuidance(PeerGuidance):
    """A peer that reads queries and keys of a block's self-attention."""

    def features(self, latents: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after norm and RoPE, (1,N,M,D) float32 each."""
        return self.queries_keys(latents, timestep, text)


class StreamGuidance(PeerGuidance):
    """A peer that reads the residual stream entering a block."""

    def features(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The stream, (F,S,C) float32."""
        recompute = self.recompute if latents.requires_grad else "none"
        stream = stream_before(self.dit, self.block, latents, timestep, text, recompute)
        return stream[0].float().unflatten(0, (self.grid[0], -1))  # (1,N,C) -> (N,C) -> (F,S,C)


def check_one_transformer(dit: WanDiT) -> None:
    """Raises UserError where hooks on blocks would miss a part of the work: of two experts, or of shared-out tokens."""
    if isinstance(dit, Experts):
        raise UserError("this method reads the blocks of one transformer, and this model has two experts: use Wan 2.1")
    if "sequence" in dit.ranks.name:
        raise UserError(f"this method needs all tokens in each process, got --parallel {dit.ranks.name}: leave it out")


def stream_before(
    dit: WanDiT, block: int, latents: Tensor, timestep: Tensor, text: Tensor, recompute: str = "none"
) -> Tensor:
    """The residual stream that enters a block, (1,N,C), as the block before it returns it.

    Raises UserError on block 0, which no block precedes.
    """
    check_one_transformer(dit)
    if block < 1:
        raise UserError(f"block must be at least 1 to read the stream that enters it, got {block}")
    streams: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        streams.append(output)  # and again, if a checkpointed block is recomputed: only the first is in the graph

    handle = dit.blocks[block - 1].register_forward_hook(keep)
    try:
        dit(latents, timestep.reshape(1), text, qk_block=block, recompute=recompute)
    finally:
        handle.remove()
    return streams[0]


def adam_updates(
    latents: Tensor, loss_fn: Callable[[Tensor], Tensor], rates: Sequence[float]
) -> tuple[Tensor, list[float], list[float]]:
    """Lower loss_fn(latents) by one Adam update for each rate, each with a gradient of its own, in float32.

    -> latents, losses, norms of the gradients. Raises FloatingPointError on a loss that is not finite.
    """
    x = latents.detach().to(torch.promote_types(latents.dtype, torch.float32), copy=True).requires_grad_()
    optimizer = torch.optim.AdamW([x], weight_decay=0.0)
    losses = []
    norms = []
    for update, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        with torch.enable_grad():
            loss = loss_fn(x)
            (x.grad,) = torch.autograd.grad(loss, x)
        losses.append(loss.item())
        norms.append(x.grad.norm().item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss is {losses[-1]} at update {update}: lower lr, or use float32")
        optimizer.step()
    return x.detach(), losses, norms
