"""The motion flow of all ordered pairs of frames, as DiTFlow (arXiv 2412.07776) reads it off queries and keys."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wan_mini.dit import WanDiT
from wan_mini.peers.config import PeerConfig

Grid = tuple[int, int, int]  # F, H, W


def displacement(q: Tensor, k: Tensor, grid: Grid, *, tau: float = 2.0, hard: bool = False) -> Tensor:
    """How far each token of each frame moves to each frame, (F,F,S,2) in tokens: rows, columns.

    q, k (1,N,M,D). A logit is the heads' mean times tau. hard: to the best match; else to the softmax's mean.
    The maps of one frame, (F,S,S), are held at a time; the backward pass computes them again.
    """
    f, h, w = grid
    scale = tau / (q.shape[2] * q.shape[3] ** 0.5)
    queries = scale * q[0].float().flatten(1).unflatten(0, (f, h * w))  # (1,N,M,D) -> (N,C) -> (F,S,C)
    keys = k[0].float().flatten(1).unflatten(0, (f, h * w))  # (1,N,M,D) -> (N,C) -> (F,S,C)
    rows = torch.arange(h, device=q.device, dtype=keys.dtype)
    columns = torch.arange(w, device=q.device, dtype=keys.dtype)
    coords = torch.cartesian_prod(rows, columns)  # (S,2)

    def from_frame(query: Tensor, keys: Tensor) -> Tensor:
        logits = query @ keys.mT  # (S,C) x (F,C,S) -> (F,S,S)
        if hard:
            return coords[logits.argmax(-1)] - coords  # -> (F,S,2)
        return logits.softmax(-1) @ coords - coords  # (F,S,S) x (S,2) -> (F,S,2)

    run = partial(checkpoint, from_frame, use_reentrant=False, preserve_rng_state=False)
    flows = []
    for query in queries:
        flows.append(run(query, keys))
    return torch.stack(flows)


@torch.no_grad()
def clean_flow(dit: WanDiT, latents: Tensor, empty_text: Tensor) -> Tensor:
    """Flow of a clean clip (1,16,F,h,w) from each latent frame to the next, (F-1,S,2) in tokens, for the preview."""
    q, k = dit(latents, torch.zeros(1), empty_text, qk_block=PeerConfig().block_of(dit))
    flow = displacement(q, k, dit.grid(latents))  # (F,F,S,2)
    return flow.diagonal(1).permute(2, 0, 1)  # frames i to i + 1: (S,2,F-1) -> (F-1,S,2)
