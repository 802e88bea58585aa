"""A loss that supervises one block of a DiT to match: its motion flow should lead each token to its true position.

The queries and keys of large video models follow motion without such supervision, and FastVMT relies on that. The
synthetic world knows the true matches, so that a small model can be supervised.
"""

import torch
from torch import Tensor


def moving_tokens(positions: Tensor, grid: tuple[int, int, int], distance: float) -> Tensor:
    """Where a token's content is more than `distance` tokens from where it was; NaN counts as no motion.

    positions (...,N,F,2), absolute rows and columns in tokens -> (...,N,F) bool.
    """
    start = torch.cartesian_prod(*map(torch.arange, grid))[:, None, 1:].to(positions)  # (N,1,2): the tokens themselves
    return (positions - start).abs().amax(-1) > distance


def matching_loss(q: Tensor, k: Tensor, positions: Tensor, grid: tuple[int, int, int], tau: float) -> Tensor:
    """Cross-entropy of the AMF's softmax (window.py, all tokens of a frame) with the true positions.

    q, k (B,N,M,D) of clips; positions (B,F,S,F,2), absolute, in tokens, NaN where unknown. A position between four
    tokens is a match with each of them, by their nearness, so that the softmax's mean, which the flow is, can be exact.
    Half of the loss is of matches that move, half of those that rest: most of a frame rests, and would have nearly all.
    """
    frames, rows, columns = grid
    logits = tau / (q.shape[2] * q.shape[3] ** 0.5) * q.flatten(2) @ k.flatten(2).mT  # (B,N,MD) -> (B,N,N)
    log_p = logits.float().unflatten(2, (frames, -1)).log_softmax(-1)  # (B,N,N) -> (B,N,F,S)
    positions = positions.flatten(1, 2)  # (B,F,S,F,2) -> (B,N,F,2)
    limit = positions.new_tensor([rows - 1, columns - 1])
    inside = positions.nan_to_num().clamp(min=torch.zeros_like(limit), max=limit)
    low = inside.floor().minimum(limit - 1)  # of the four tokens around a position, the one at the top left
    loss = torch.zeros_like(log_p[..., 0])
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        token = low + low.new_tensor(corner)
        weight = (1 - (inside - token).abs()).prod(-1)  # (B,N,F,2) -> (B,N,F), the four add up to 1
        number = (token[..., 0] * columns + token[..., 1]).long()
        loss = loss - weight * log_p.gather(-1, number[..., None])[..., 0]  # (B,N,F,S) -> (B,N,F)
    other = ~torch.eye(frames, dtype=torch.bool, device=q.device).repeat_interleave(rows * columns, 0)  # (N,F)
    counted = other & positions.isfinite().all(-1)  # (B,N,F)
    moves = moving_tokens(positions, grid, 1 / 4)  # (B,N,F)
    total = loss.new_zeros(())
    for group in (counted & moves, counted & ~moves):
        if group.any():
            total = total + loss[group].mean() / 2
    return total
