"""Which heads attend in space and which in time: Follow-Your-Motion's first stage (arXiv 2506.05207, Algorithm 1).

A head's attention map is compared with two masks of equal area: a band around the diagonal, tokens numbered frame by
frame (space), and the same band, tokens numbered position by position (time). The masks are Sparse VideoGen's (arXiv
2502.01776), without its blocks of 128 tokens, which are empty on small grids.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wan_mini.dit import WanDiT
from wan_mini.errors import check_choice

Grid = tuple[int, int, int]  # F, H, W
Masks = Callable[[Tensor, Grid], tuple[Tensor, Tensor]]  # queries (R,), grid -> spatial and temporal rows, (R,N) bool
ROWS = 256  # rows of the attention map that are held at once
RULES = ("paper", "release")


def band_masks(queries: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Rows of both bands, whose half width is a frame's number of tokens: queries (R,) -> (R,N) bool, (R,N) bool."""
    frames, height, width = grid
    size = height * width
    tokens = torch.arange(frames * size, device=queries.device)
    spatial = (queries[:, None] - tokens).abs() <= size  # (R,1), (N,) -> (R,N)
    by_position = tokens % size * frames + tokens // size  # a token's number if each position's frames follow in turn
    temporal = (by_position[queries][:, None] - by_position).abs() <= size
    return spatial, temporal


def exact_masks(queries: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Rows of "same frame" and "same position", whose areas differ: queries (R,) -> (R,N) bool, (R,N) bool."""
    frames, height, width = grid
    size = height * width
    tokens = torch.arange(frames * size, device=queries.device)
    spatial = (queries // size)[:, None] == tokens // size  # (R,1), (N,) -> (R,N)
    temporal = (queries % size)[:, None] == tokens % size
    return spatial, temporal


MASKS: dict[str, Masks] = {"band": band_masks, "exact": exact_masks}


def mask_similarity(q: Tensor, k: Tensor, grid: Grid, masks: Masks = band_masks, rows: int = ROWS) -> Tensor:
    """Cosine of each head's attention map with both masks: q, k (N,M,D) -> (M,2), spatial and temporal.

    The map, softmax(q k^T / sqrt(D)), is made `rows` rows at a time.
    """
    count, heads, width = q.shape
    queries = q.float().transpose(0, 1) / width**0.5  # (N,M,D) -> (M,N,D)
    keys = k.float().transpose(0, 1)  # (N,M,D) -> (M,N,D)
    products = q.new_zeros(heads, 2, dtype=torch.float64)
    squares = q.new_zeros(heads, dtype=torch.float64)
    areas = q.new_zeros(2, dtype=torch.float64)
    for chunk in torch.arange(count, device=q.device).split(rows):
        attention = (queries[:, chunk] @ keys.mT).softmax(-1)  # (M,R,D) x (M,D,N) -> (M,R,N)
        squares += torch.linalg.vector_norm(attention, dim=(1, 2), dtype=torch.float64).square()
        for index, mask in enumerate(masks(chunk, grid)):
            products[:, index] += torch.einsum("mrn,rn->m", attention, mask.float())
            areas[index] += mask.sum()
    return products / (squares[:, None] * areas).sqrt()


@torch.no_grad()
def similarities(
    dit: WanDiT,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    masks: Masks = band_masks,
    blocks: int | None = None,
) -> Tensor:
    """mask_similarity of every head in one pass without adapters: latents (1,16,F,h,w) -> (L,M,2) float64.

    blocks: of so many blocks only, the first; to count memory, which is the same for each.
    """
    grid = dit.grid(latents)
    measured: list[Tensor] = []

    def compare(module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        attention: Any = module
        x = inputs[0].to(attention.q.weight.dtype)
        q, k = attention.qk(x, x, options["rope"])  # (1,N,M,D) each
        measured.append(mask_similarity(q[0], k[0], grid, masks))

    handles = []
    for block in dit.blocks[:blocks]:
        attention: Any = block.self_attn
        handles.append(attention.register_forward_pre_hook(compare, with_kwargs=True))
    try:
        dit(latents, timestep, text)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(measured)


def temporal_heads(sims: Tensor, ratio: float = 1.3, rule: str = "paper") -> Tensor:
    """Labels (L,M) bool from similarities (L,M,2): which heads are temporal, the others being spatial.

    rule "paper": unless the spatial similarity is `ratio` times the temporal; "release": if the temporal one is `ratio`
    times the spatial. Undecided heads are temporal by the first, spatial by the second.
    """
    check_choice("rule", rule, RULES)
    spatial, temporal = sims.unbind(-1)  # (L,M,2) -> (L,M), (L,M)
    if rule == "paper":
        return spatial < ratio * temporal
    return temporal >= ratio * spatial


def relabel(labels: Tensor, control: str, seed: int) -> tuple[Tensor, Tensor]:
    """Heads of the spatial and of the temporal adapters, (L,M) bool each, from labels (L,M).

    control "labeled": as the labels say; "all": both on all heads; "random": as many temporal heads, drawn at random;
    "swapped": the other way round.
    """
    everything = torch.ones_like(labels)
    if control == "all":
        return everything, everything
    if control == "swapped":
        return labels, ~labels
    if control == "random":
        order = np.random.default_rng([seed % 2**64, labels.numel()]).permutation(labels.numel())
        labels = labels.flatten()[torch.from_numpy(order).to(labels.device)].view_as(labels)
    return ~labels, labels
