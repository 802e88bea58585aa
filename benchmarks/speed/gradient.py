"""One gradient evaluation of the guidance, ours beside the released schedule of the same mathematics.

The gradient is nearly all of what guidance costs, so this ratio is the method's speed. The rows between show what each
saving is worth: no flushes (of fixed cost, so much to a small model), truncating the forward, and keeping activations
instead of computing them again. All gradients must be the same, or the program stops. The first gradient of a guided
step costs more: it also measures the gradient norm of each loss. A reuse step is one AdamW update: of latents,
gradient and two moments all are read, and all but the gradient written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.speed.bench import Bench, build_parser
from benchmarks.speed.guided_step import GuidedStep
from benchmarks.speed.measure import difference
from benchmarks.speed.random_models import random_dit
from benchmarks.speed.release_schedule import ReleaseGuidance, flush, release_optimize
from fastvmt import FastVMT
from skip_optim import optimize
from wan_mini.attention import apply_rope, rope_table
from wan_mini.device.flops import gradient_flops
from wan_mini.device.select import attention_backend, float32_products
from wan_mini.dit import Block
from wan_mini.runs.cli import run

# Norm of two gradients' difference over the norm of one, at most: where the arithmetic is the same (a GPU adds in any
# order), and where rounding differs (complex RoPE; the tiny model's bfloat16 gradient is 0.2 off its float32 one).
SAME_ARITHMETIC = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
OTHER_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.2}
TF32 = "ours, TF32"  # on a CPU the same as ours
REUSED = 20  # updates in a row; the first has a gradient, of next to nothing


class WholeModelGuidance(FastVMT):
    """Guidance without truncation: the whole model runs, and a hook captures its q and k on the way."""

    def queries_keys(self, latents: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of the block, (1,N,M,D) each."""
        attention = cast(Block, self.dit.blocks[self.block]).self_attn
        captured: dict[str, Tensor] = {}

        def capture(name: str, module: Any, inputs: Any, output: Tensor) -> None:
            captured.setdefault(name, output)  # (1,N,C), before RoPE; a recomputation calls again

        hooks = [
            attention.norm_q.register_forward_hook(partial(capture, "q")),
            attention.norm_k.register_forward_hook(partial(capture, "k")),
        ]
        recompute = self.recompute if latents.requires_grad else "none"
        self.dit(latents, timestep.reshape(1), text, recompute=recompute)
        for hook in hooks:
            hook.remove()
        heads = (attention.num_heads, -1)
        q = captured["q"].unflatten(-1, heads)  # (1,N,C) -> (1,N,M,D)
        k = captured["k"].unflatten(-1, heads)
        rope = rope_table(self.grid, q.shape[-1], latents.device)
        return apply_rope(q, rope), apply_rope(k, rope)


@dataclass(frozen=True)
class Schedule:
    """One way to compute a gradient."""

    guidance: type[FastVMT]
    recompute: str  # what of a block is recomputed
    flushed: bool  # whether memory is flushed after it


SCHEDULES = {
    "released schedule": Schedule(ReleaseGuidance, "block", True),
    "released, not flushed": Schedule(ReleaseGuidance, "block", False),
    "whole model, blocks recomputed": Schedule(WholeModelGuidance, "block", False),
    "ours, blocks recomputed": Schedule(FastVMT, "block", False),
    "ours, all but attention recomputed": Schedule(FastVMT, "selective", False),
    "ours": Schedule(FastVMT, "none", False),
}


def compute_gradient(
    latents: Tensor,
    loss: Callable[[Tensor], Tensor],
    flushed: bool,
    gradients: dict[str, Tensor],
    name: str,
    norms: dict[str, float] | None = None,
) -> None:
    """One gradient, stored by its name; norms: cleared, so that it is the first of its step."""
    if norms is not None:
        norms.clear()
    x = latents.clone().requires_grad_()
    (gradients[name],) = torch.autograd.grad(loss(x), x)
    if flushed:
        flush()


def time_gradients(bench: Bench, step: GuidedStep) -> dict[str, Tensor]:
    """A row for each schedule; returns their gradients."""
    gradients: dict[str, Tensor] = {}
    operations = gradient_flops(bench.size.dit, prod(bench.size.grid), bench.size.block)
    for name, schedule in SCHEDULES.items():
        norms: dict[str, float] = {}
        loss = step.loss(schedule.guidance, schedule.recompute, norms)
        call = partial(compute_gradient, step.latents, loss, schedule.flushed, gradients, name)
        bench.row(name, call, reference="released schedule", operations=operations)
    first = partial(call, norms=norms)  # of the last schedule, ours
    bench.row("ours, first of a guided step", first, reference="ours", operations=operations)
    with float32_products(bench.device, "tf32"):  # of losses, head and time MLP
        call = partial(compute_gradient, step.latents, loss, False, gradients, TF32)
        bench.row(TF32, call, reference="ours", operations=operations)
    return gradients


def time_reuse(bench: Bench, latents: Tensor) -> None:
    """Updates without a gradient, beside the gradient of the same schedule."""
    for name, function, gradient in (("released", release_optimize, "released schedule"), ("ours", optimize, "ours")):
        call = partial(function, latents, lambda x: x.square().sum(), steps=REUSED, interval=REUSED, lr=(0.003, 0.002))
        moved = 7 * latents.nbytes
        bench.row(f"reuse step, {name}", call, times=REUSED, reference=gradient, moved=moved)


def main(argv: list[str] | None = None) -> None:
    """Measure, compare, print."""
    bench = Bench("gradient", build_parser(__doc__).parse_args(argv))
    dit = random_dit(bench.size.dit, bench.device, bench.dtype)
    with attention_backend(bench.attention):
        step = GuidedStep(bench, dit)
        gradients = time_gradients(bench, step)
    time_reuse(bench, step.latents)
    for name, gradient in gradients.items():
        error = difference(gradient, gradients["ours, blocks recomputed"])
        bench.results[f"gradient, {name}: difference"] = error
        other_rounding = name == TF32 or SCHEDULES[name].guidance is ReleaseGuidance
        limits = OTHER_ROUNDING if other_rounding else SAME_ARITHMETIC
        assert error <= limits[bench.dtype], f"{name} computes another gradient: {error}"
    bench.finish()


if __name__ == "__main__":
    raise SystemExit(run(main))
