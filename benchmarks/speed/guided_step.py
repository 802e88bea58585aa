"""One guided step of a transfer, for any schedule of its gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.bench import Bench
from benchmarks.speed.random_models import random_inputs
from fastvmt import Guide
from wan_mini.dit import WanDiT
from wan_mini.scheduler import FlowEuler


class GuidedStep:
    """The second guided step of a transfer (at the first, both latents are the same noise)."""

    def __init__(self, bench: Bench, dit: WanDiT):
        self.dit = dit
        self.config = bench.size.motion
        self.reference, noise, self.text = random_inputs(bench.size, bench.device)
        scheduler = FlowEuler(self.config.steps, self.config.shift)
        self.timestep = scheduler.timesteps[1]
        sigma = scheduler.sigmas[1]
        self.latents = (1 - sigma) * self.reference.flip(2) + sigma * noise
        self.noised_reference = (1 - sigma) * self.reference + sigma * noise
        self.centers = self.guidance(Guide).centers

    @torch.no_grad()
    def guidance(self, kind: type[Guide]) -> Guide:
        """A guidance whose prompt is its empty text, too."""
        return kind(self.dit, self.reference, self.text, self.text, self.config)

    @torch.no_grad()
    def loss(self, kind: type[Guide], recompute: str) -> tuple[Callable[[Tensor], Tensor], dict[str, float]]:
        """Its loss, for all kinds with the same windows: rounding could move an argmax.

        Also a dict: the loss that finds it empty does what the first gradient of a step does, it measures the norms.
        """
        guidance = self.guidance(kind)
        guidance.centers = self.centers
        guidance.recompute = recompute
        loss = guidance.loss_at(self.timestep, self.noised_reference)
        norms: Any = guidance.report["key_gradient_norms"]
        return loss, norms[-1]
