"""Muon: momentum whose update is made orthogonal, so that all directions of a weight matrix move equally fast.

A gradient is mostly of low rank: a few directions get nearly all of Adam's step too, the many others wait.
torch.optim.Muon takes no convolutions, and works in bfloat16, which most CPUs do slowly.

Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (kellerjordan.github.io/posts/muon).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
QUINTIC = 3.4445, -4.7750, 2.0315  # a x + b x^3 + c x^5: five times over, it takes any x of (0.01, 1] into (0.7, 1.2)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Bring all singular values of a matrix (m,n) near 1 and leave its singular vectors, by matrix products alone.

    An odd polynomial of X is U p(S) V^T for X = U S V^T. Zero stays zero.
    """
    a, b, c = QUINTIC
    x = matrix / matrix.norm().clamp(min=1e-12)  # no singular value exceeds the norm
    x = x.mT if (tall := len(x) > x.shape[1]) else x  # (m,n) with m <= n: the smaller of the two Gram matrices
    for _ in range(5):
        gram = x @ x.mT  # (m,m)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for the weights of linear and convolution layers; a convolution's (out,in,...) is a matrix (out, in*...)."""

    def __init__(self, parameters: Iterable[Tensor], lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - MOMENTUM)
                matrix = weight.grad.lerp(average, MOMENTUM).flatten(1)  # Nesterov's look ahead
                scale = max(1, len(matrix) / matrix.shape[1]) ** 0.5  # a step of the same size in each output
                weight.add_(orthogonalized(matrix).view_as(weight), alpha=-group["lr"] * scale)


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return what Muon is for, the weights of linear and convolution layers, and all the rest."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]
    matrices = {id(layer.weight): layer.weight for layer in layers}
    return list(matrices.values()), [p for p in model.parameters() if id(p) not in matrices]
