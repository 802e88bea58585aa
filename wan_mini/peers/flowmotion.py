"""FlowMotion (arXiv 2603.06289): the predicted clean latents and their changes, without a backward pass of the model.

The velocity v is a constant, and the gradient runs through x0 = x - sigma v alone: no activations are kept. Its latent
term asks for the reference's latents themselves, so that look and layout come along with the motion.
The paper's regularization of the velocity is not here: its form was not to be had.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wan_mini.errors import check_choice, check_range
from wan_mini.peers.config import PeerConfig
from wan_mini.peers.guidance import PeerGuidance


@dataclass(frozen=True)
class FlowMotionConfig(PeerConfig):
    """Options of FlowMotion: 10 of 50 steps with 3 updates, as published; FastVMT's rates, its own are not known."""

    optim_steps: int = 3
    lr: tuple[float, float] = (0.003, 0.002)
    lr_over: str = "updates"
    reference: str = "noised"  # the target is the clean latents predicted from the noised reference; "clean": its own
    weights: tuple[float, float] = (20.0, 5.0)  # of the latents and of their changes from frame to frame
    velocity: str = "update"  # computed anew at each update, or once a guided "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("weights", self.weights)
        check_choice("velocity", self.velocity, ("update", "step"))


class FlowMotion(PeerGuidance):
    """Lowers the squared distance of predicted clean latents, and of their changes, from the reference's."""

    history = (*PeerGuidance.history, "forwards")
    forwards = 0  # of the model, all without a backward

    def loss_at(self, latents: Tensor, sigma: Tensor, timestep: Tensor) -> Callable[[Tensor], Tensor]:
        """The loss at a guided step. The velocity is that of the step's first latents, or of each update's own."""
        target = self.reference
        if self.config.reference == "noised":
            noised = self.noised(sigma)
            target = noised - sigma * self.constant_velocity(noised, timestep, self.empty_text)
        velocity = None
        if self.config.velocity == "step":
            velocity = self.constant_velocity(latents, timestep, self.text)
        return partial(self.predicted_loss, sigma=sigma, timestep=timestep, target=target, velocity=velocity)

    def predicted_loss(
        self, latents: Tensor, sigma: Tensor, timestep: Tensor, target: Tensor, velocity: Tensor | None
    ) -> Tensor:
        """latent_distance of x - sigma v from the target, (1,16,F,h,w); velocity None: of these latents -> ()."""
        if velocity is None:
            velocity = self.constant_velocity(latents, timestep, self.text)
        return latent_distance(latents - sigma * velocity, target, self.config.weights)

    @torch.no_grad()
    def constant_velocity(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The model's velocity as a constant, (1,16,F,h,w)."""
        self.forwards += 1
        return self.dit(latents.detach(), timestep.reshape(1), text)

    def report(self) -> dict[str, Any]:
        """With the passes of the model, none of which has a gradient."""
        return super().report() | {"gradients": 0, "forwards": self.forwards}


def latent_distance(latents: Tensor, reference: Tensor, weights: tuple[float, float] = (20.0, 5.0)) -> Tensor:
    """Weighted sum of two mean squared distances: of latents (1,16,F,h,w), and of their changes over frames -> ()."""
    difference = latents - reference
    of_changes = difference.diff(dim=2)  # (1,16,F,h,w) -> (1,16,F-1,h,w)
    return weights[0] * difference.square().mean() + weights[1] * of_changes.square().mean()
