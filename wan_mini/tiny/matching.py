"""A loss that teaches one block of a DiT to match: its motion flow shall find each token where the world put it.

Large video models' queries and keys follow motion though nobody asked them to: FastVMT lives on that. Our small
one did not learn it from flow matching alone. The world knows the true matches, so it can be asked to.
"""

import torch
from torch import Tensor


def matching_loss(q: Tensor, k: Tensor, places: Tensor, grid: tuple[int, int, int], tau: float) -> Tensor:
    """Cross-entropy of the AMF's softmax (window.py, all tokens of a frame) with the true places.

    q, k (B,N,M,D) of clips; places (B,F,S,F,2), absolute, in tokens, NaN where unknown. A place between four tokens is
    a match with each of them, by their nearness, so that the softmax's mean, which the flow is, can be exact. Half of
    the loss is of matches that move, half of those that rest: most of a frame rests, and would have nearly all of it.
    """
    frames, rows, columns = grid
    logits = tau / (q.shape[2] * q.shape[3] ** 0.5) * q.flatten(2) @ k.flatten(2).mT  # (B,N,MD) -> (B,N,N)
    log_p = logits.float().unflatten(2, (frames, -1)).log_softmax(-1)  # (B,N,N) -> (B,N,F,S)
    places = places.flatten(1, 2)  # (B,F,S,F,2) -> (B,N,F,2)
    known = places.isfinite().all(-1)  # (B,N,F)
    limit = places.new_tensor([rows - 1, columns - 1])
    at = places.nan_to_num().clamp(min=torch.zeros_like(limit), max=limit)
    low = at.floor().minimum(limit - 1)  # of the four tokens around a place, the one at the top left
    loss = 0
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        token = low + low.new_tensor(corner)
        weight = (1 - (at - token).abs()).prod(-1)  # (B,N,F,2) -> (B,N,F), the four add up to 1
        number = (token[..., 0] * columns + token[..., 1]).long()
        loss = loss - weight * log_p.gather(-1, number[..., None])[..., 0]  # (B,N,F,S) -> (B,N,F)
    start = torch.cartesian_prod(*map(torch.arange, grid))[:, None, 1:].to(places)  # (N,1,2): each token's own place
    moves = (places - start).abs().amax(-1) > 1 / 4  # NaN: False. (B,N,F,2) -> (B,N,F)
    other = ~torch.eye(frames, dtype=torch.bool, device=q.device).repeat_interleave(rows * columns, 0)  # (N,F)
    halves = [loss[known & other & group].mean() for group in (moves, ~moves)]
    return sum(half for half in halves if half.isfinite()) / 2
