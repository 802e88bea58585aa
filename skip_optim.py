"""Latent optimization that computes a gradient only every few steps: FastVMT (arXiv 2602.05551) Eq. 9, 10.

The gradient is nearly all of a step's cost, and FastVMT finds that it hardly changes from one step to the next.
This file knows nothing of Wan: a latent, a loss, a schedule of learning rates.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Report:
    """What an optimization evaluated."""

    losses: list[float] = field(default_factory=list)  # at each gradient, and at the end if `stop` ended it
    gradients: int = 0  # evaluated: ceil(steps / interval), unless it ended early or was given one
    gradient: Tensor | None = None  # the last one, of the latents' shape


def optimize(
    latents: Tensor,
    loss_fn: Callable[[Tensor], Tensor] | None,
    *,
    steps: int = 10,
    interval: int = 3,
    lr: tuple[float, float] = (0.003, 0.002),
    gradient: Tensor | None = None,
    stop: Callable[[list[float]], bool] | None = None,
) -> tuple[Tensor, Report]:
    """Lower loss_fn(latents) by `steps` AdamW updates with a gradient at steps 0, interval, 2 interval, ...

    latents of any shape; loss_fn takes them, float32, and returns a scalar. The other steps reuse the last gradient
    (Eq. 10): they run neither loss_fn nor autograd. The learning rate falls linearly from lr[0] to lr[1]; no weight
    decay, a fresh optimizer each call. interval=1 is plain AdamW. gradient: of an earlier call, for all steps, if
    loss_fn is None. stop: asked with the losses so far, from the second on, whether the latents are good enough.
    -> optimized latents, a float32 copy, and the report. In bfloat16, whose neighbors above 1 are 0.008 apart, an
    update of 0.003 would round away.
    Raises ValueError on steps or interval below 1, FloatingPointError on a loss that is not finite.
    """
    if steps < 1 or interval < 1:
        raise ValueError(f"steps and interval must be at least 1, got {steps} and {interval}")
    dtype = torch.promote_types(latents.dtype, torch.float32)
    x = latents.detach().to(dtype, copy=True).requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=lr[0], weight_decay=0.0)
    report = Report()
    x.grad = gradient
    for step in range(steps):
        rate = lr[0] + (lr[1] - lr[0]) * step / max(steps - 1, 1)
        optimizer.param_groups[0]["lr"] = rate
        if loss_fn is not None and step % interval == 0:  # Eq. 9; else x.grad is the last gradient, Eq. 10
            with torch.enable_grad():
                loss = loss_fn(x)
            report.losses.append(loss.item())
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss is {loss.item()} at inner step {step}: lower lr, or use float32")
            if stop is not None and step > 0 and stop(report.losses):
                break
            (x.grad,) = torch.autograd.grad(loss, x)
            report.gradients += 1
        optimizer.step()
    report.gradient = x.grad
    return x.detach(), report
