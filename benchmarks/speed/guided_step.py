"""One guided step of a transfer, for any schedule of its gradients."""

from functools import partial

import torch

from benchmarks.speed.bench import Bench
from benchmarks.speed.random_models import random_inputs
from fastvmt import FastVMT
from wan_mini.dit import WanDiT
from wan_mini.scheduler import FlowEuler


class GuidedStep:
    """The second guided step of a transfer (at the first, both latents are the same noise)."""

    def __init__(self, bench: Bench, dit: WanDiT):
        self.dit = dit
        self.config = bench.size.motion
        self.reference, self.noise, self.text = random_inputs(bench.size, bench.device)
        scheduler = FlowEuler(self.config.steps, self.config.shift)
        self.timestep = scheduler.timesteps[1]
        self.sigma = scheduler.sigmas[1]
        self.latents = (1 - self.sigma) * self.reference.flip(2) + self.sigma * self.noise
        with torch.no_grad():
            self.target = self.guidance(FastVMT).target_at(self.sigma, self.timestep)

    @torch.no_grad()
    def guidance(self, kind: type[FastVMT], recompute: str = "none") -> FastVMT:
        """A guidance whose prompt is its empty text, too."""
        return kind(self.dit, self.reference, self.noise, self.text, self.text, self.config, recompute)

    def loss(self, kind: type[FastVMT], recompute: str, norms: dict[str, float]) -> partial:
        """Its loss as a function of latents, for all kinds with the same target: rounding could move an argmax.

        norms: while empty, the next gradient is the first of its step, which measures the gradient norm of each loss.
        """
        guidance = self.guidance(kind, recompute)
        return partial(guidance.loss, timestep=self.timestep, target=self.target, norms=norms)
