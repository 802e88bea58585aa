"""One gradient evaluation of the guidance, ours beside the released schedule of the same mathematics.

The gradient is nearly all of what guidance costs, so this ratio is the method's speed. The rows between show what each
saving is worth: no flushes (of fixed cost, so much to a small model), truncating the forward, and keeping activations
instead of computing them again. All gradients must be the same, or the script stops. The first gradient of a guided
step costs more: it also notes how hard each loss pulls. A reuse step is one AdamW update: of latent, gradient and two
moments all are read, and all but the gradient written.
"""

from collections.abc import Callable
from math import prod
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import Bench, difference, parser
from benchmarks.models import random_dit, random_inputs
from benchmarks.released import ReleasedGuide, flush, released_optimize
from fastvmt import Guide
from skip_optim import optimize
from wan_mini.device.flops import gradient_flops
from wan_mini.dit import Attention, WanDiT
from wan_mini.scheduler import FlowEuler

# Norm of two gradients' difference over the norm of one, at most: where the arithmetic is the same (a GPU adds in any
# order), and where rounding differs (complex RoPE; the tiny model's bfloat16 gradient is 0.2 off its float32 one).
NOISE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.2}
REUSED = 20  # updates in a row; the first has a gradient, of next to nothing


class WholeGuide(Guide):
    """Guide without truncation: the whole model runs, and its q and k are picked up on the way."""

    def qk(self, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        attn, found = self.dit.blocks[self.block].self_attn, []

        def listen(*inputs):
            found.append(Attention.qk(attn, *inputs))
            return found[0]

        with patch.object(attn, "qk", listen):
            self.dit(x, timestep.reshape(1), text, recompute=self.recompute if x.requires_grad else "none")
        return found[0]


WAYS = {  # guide, what of a block is recomputed, memory flushed
    "released schedule": (ReleasedGuide, "block", True),
    "released, not flushed": (ReleasedGuide, "block", False),
    "whole model, blocks recomputed": (WholeGuide, "block", False),
    "ours, blocks recomputed": (Guide, "block", False),
    "ours, all but attention recomputed": (Guide, "selective", False),
    "ours": (Guide, "none", False),
}


class Step:
    """The second guided step of a transfer (at the first, both latents are the same noise)."""

    def __init__(self, bench: Bench, dit: WanDiT):
        self.dit, self.config = dit, bench.size.motion
        self.z_ref, noise, self.text = random_inputs(bench.size, bench.device)
        scheduler = FlowEuler(self.config.steps, self.config.shift)
        self.timestep, sigma = scheduler.timesteps[1], scheduler.sigmas[1]
        self.x, self.noised = ((1 - sigma) * z + sigma * noise for z in (self.z_ref.flip(2), self.z_ref))
        self.centers = self.guide(Guide).centers

    @torch.no_grad()
    def guide(self, kind: type[Guide]) -> Guide:
        """A guide, null text and prompt being the same."""
        return kind(self.dit, self.z_ref, self.text, self.text, self.config)

    @torch.no_grad()
    def loss(self, kind: type[Guide], recompute: str) -> tuple[Callable[[Tensor], Tensor], Guide]:
        """Its loss, all kinds with the same windows: rounding could move an argmax."""
        guide = self.guide(kind)
        guide.centers, guide.recompute = self.centers, recompute
        return guide.loss_at(self.timestep, self.noised), guide


def time_gradients(bench: Bench, step: Step) -> dict[str, Tensor]:
    """A row for each way; their gradients."""
    tokens, gradients = prod(bench.size.grid), {}
    operations = gradient_flops(bench.size.dit, tokens, step.config.block_of(step.dit))
    for name, (kind, recompute, flushed) in WAYS.items():
        loss, guide = step.loss(kind, recompute)
        norms = guide.report["key_gradient_norms"][-1]

        def call(name=name, loss=loss, flushed=flushed):
            x = step.x.clone().requires_grad_()
            (gradients[name],) = torch.autograd.grad(loss(x), x)
            if flushed:
                flush()

        bench.row(name, call, to="released schedule", operations=operations)
    bench.row("ours, first of a guided step", lambda: (norms.clear(), call()), to="ours", operations=operations)
    return gradients


def time_reuse(bench: Bench, x: Tensor) -> None:
    """Updates without a gradient, beside the gradient of the same schedule."""
    for name, function, to in (("released", released_optimize, "released schedule"), ("ours", optimize, "ours")):
        options = {"steps": REUSED, "interval": REUSED, "lr": (0.003, 0.002)}

        def call(function=function, options=options):
            function(x, lambda x: x.square().sum(), **options)

        bench.row(f"reuse step, {name}", call, times=REUSED, to=to, moved=7 * x.nbytes)


def main(argv: list[str] | None = None) -> None:
    """Measure, compare, print."""
    bench = Bench("gradient", parser(__doc__).parse_args(argv))
    dit = random_dit(bench.size.dit, bench.device, bench.dtype)
    step = Step(bench, dit)
    gradients = time_gradients(bench, step)
    time_reuse(bench, step.x)
    for name, result in gradients.items():
        error = difference(result, gradients["ours, blocks recomputed"])
        bench.facts[f"gradient, {name}: difference"] = error
        limit = (ROUNDING if WAYS[name][0] is ReleasedGuide else NOISE)[bench.dtype]
        assert error <= limit, f"{name} computes another gradient: {error}"
    bench.finish()


if __name__ == "__main__":
    main()
