"""Muon: momentum whose update is made orthogonal, so that all directions of a weight matrix move equally fast.

A gradient is mostly of low rank: a few directions get nearly all of Adam's step too, the many others wait.
torch.optim.Muon takes no convolutions, and works in bfloat16 only, which most CPUs do slowly.

Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (kellerjordan.github.io/posts/muon).
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5: five times over, it takes any x of (0.01, 1] to (0.7, 1.2)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring all singular values of matrices (k,m,n) near 1 and leave their singular vectors, by products alone.

    An odd polynomial of X is U p(S) V^T for X = U S V^T. Zero stays zero.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalized(matrices.mT).mT  # so that m <= n: the smaller of the two Gram matrices
    a, b, c = QUINTIC
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)  # no singular value exceeds the norm
    for _ in range(5):
        gram = x @ x.mT  # (k,m,m)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G G
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a X + polynomial X
    return x


class Muon(torch.optim.Optimizer):
    """Muon for the weights of linear and convolution layers; a convolution's (out,in,...) is a matrix (out, in*...)."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, dtype: torch.dtype = torch.float32):
        super().__init__(parameters, {"lr": lr})
        self.dtype = dtype  # of the products; bfloat16 is enough, as singular values need not be exact

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient; those of one shape together, as one product is faster."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.flatten(1).shape].append(weight)
            for shape, weights in by_shape.items():
                stack = torch.stack([self._direction(weight) for weight in weights])  # (k,m,n)
                updates = orthogonalized(stack.to(self.dtype)).to(stack.dtype)
                scale = max(1, shape[0] / shape[1]) ** 0.5  # a step of the same size in each output
                for weight, update in zip(weights, updates, strict=True):
                    weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)

    def _direction(self, weight: Tensor) -> Tensor:
        """Momentum with Nesterov's look ahead, as a matrix (m,n)."""
        average = self.state[weight].setdefault("average", torch.zeros_like(weight))
        average.lerp_(weight.grad, 1 - MOMENTUM)
        return torch.lerp(cast(Tensor, weight.grad), average, MOMENTUM).flatten(1)


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return what Muon is for, the weights of linear and convolution layers, and all the rest."""
    matrices: dict[int, Tensor] = {}  # by identity: a shared weight counts once
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            matrices[id(layer.weight)] = layer.weight
    rest: list[Tensor] = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    return list(matrices.values()), rest
