"""What FastVMT minimizes: the distance of two motion flows, and the change of a tile's keys along its own track.

FastVMT (arXiv 2602.05551) Eq. 5-8. Tensors in, scalar out; no model. Flows and windows come from window.py, whose
pairs (i, j) are latent frames.
"""

from itertools import chain

import torch
from torch import Tensor


def amf_loss(flow_ref: Tensor, flow_gen: Tensor, pairs: list[tuple[int, int]], span: int, alpha: float = 0.2) -> Tensor:
    """Squared distance of the flows, near frames weighted more: Eq. 5, weights of Eq. 6.

    flow_ref, flow_gen (len(pairs), S, 2) in tokens; the reference gets no gradient. Sum over tokens, mean over pairs:
    (1/pairs) sum_ij w_(j-i) |ref_ij - gen_ij|^2, w_d = 1 - alpha (d - 1) / (span - 1), so w_1 = 1, w_span = 1 - alpha.
    span: the largest distance of a pair, in latent frames; alpha in [0,1]. -> scalar in the flows' dtype.
    """
    distances = [j - i for i, j in pairs]
    distance = torch.tensor(distances, device=flow_gen.device, dtype=flow_gen.dtype)
    weight = 1 - alpha * (distance - 1) / max(span - 1, 1)  # (pairs,)
    error = (flow_ref.detach() - flow_gen).square().sum((1, 2))  # (pairs,S,2) -> (pairs,)
    return (weight * error).mean()


def window_loss(
    k: Tensor, grid: tuple[int, int, int], pairs: list[tuple[int, int]], windows: Tensor, every: int = 1
) -> Tensor:
    """Tracking loss: squared change of a tile's mean window key from one target frame to the next (Eq. 7), per head.

    k (1,N,M,D); windows (len(pairs), tiles, keys) of windowed_amf; pairs all of frame_pairs(F, span, every), any order.
    (1/F) sum_i mean_tiles 1/(n_i - 1) sum_t |K_(i->i+t+1) - K_(i->i+t)|^2 / M, n_i the number of targets of anchor i;
    anchors with n_i < 2 count 0. every: only frames 0, every, ... are anchors, and F is their number.
    -> scalar, at least float32. Raises ValueError if a pair is missing.
    """
    frames, height, width = grid
    span = max(j - i for i, j in pairs)
    index = {pair: n for n, pair in enumerate(pairs)}
    by_distance = [[(i, i + d) for i in range(0, frames - d, every)] for d in range(1, span + 1)]
    if index.keys() != set(chain.from_iterable(by_distance)):
        raise ValueError(f"window_loss needs all pairs of {frames} frames up to distance {span}, got {pairs}")
    dtype = torch.promote_types(k.dtype, torch.float32)
    keys = k[0].to(dtype).flatten(1).unflatten(0, (frames, height * width))  # (1,N,M,D) -> (N,C) -> (F,S,C)
    means = []  # mean keys of each distance d = 1, 2, ...: (F-d, tiles, C)
    for d, of_distance in enumerate(by_distance, start=1):
        chosen = windows[[index[pair] for pair in of_distance]]  # (F-d, tiles, keys)
        share = keys.new_zeros(*chosen.shape[:2], height * width)  # (F-d, tiles, S): of each key in its window's mean
        share.scatter_(2, chosen, 1 / chosen.shape[2], reduce="add")
        means.append(share @ keys[d::every])  # (F-d, tiles, S) x (F-d, S, C): the mean as a product, no keys gathered
    loss = k.new_zeros((), dtype=keys.dtype)
    for d in range(1, span):
        step = means[d] - means[d - 1][: len(means[d])]  # (F-d-1, tiles, C): from target frame i+d to i+d+1
        change = step.square().sum(2).mean(1) / k.shape[2]  # (F-d-1, tiles, C) -> (F-d-1,), per head
        numbers = torch.arange(0, frames - d - 1, every, device=k.device)
        targets = (frames - 1 - numbers).clamp(max=span)  # n_i of each anchor
        loss = loss + (change / (targets - 1)).sum()
    return loss / len(range(0, frames, every))


def total_loss(amf: Tensor, window: Tensor, weights: tuple[float, float] = (5.0, 1.0)) -> Tensor:
    """Weighted sum of amf_loss and window_loss, both scalars: Eq. 8."""
    return weights[0] * amf + weights[1] * window


def key_gradient_norms(amf: Tensor, window: Tensor, weights: tuple[float, float], k: Tensor) -> dict[str, float]:
    """Norm of each weighted loss's gradient at the keys k (1,N,M,D), on which both losses act."""
    norms = {}
    for name, loss in (("amf", weights[0] * amf), ("window", weights[1] * window)):
        norms[name] = 0.0
        if loss.requires_grad:  # one pair has no window loss, dense flow no windows: constants
            (gradient,) = torch.autograd.grad(loss, k, retain_graph=True)
            norms[name] = gradient.norm().item()
    return norms
