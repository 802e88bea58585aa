"""Attention Motion Flow (AMF): how far each token of one frame moves to another frame, read off queries and keys.

Dense AMF compares every token with every token of the other frame. FastVMT (arXiv 2602.05551, Sec. 3.3) first locates
one representative of each tile of tokens in the other frame (Eq. 1, 2, 4), then lets the tile's tokens look only at a
window around that position (Eq. 3). Windows are boxes of distinct keys: at borders they are shifted, never padded.
A window puts far, wrong matches out of reach (and right ones, if two objects swap positions). It saves little time:
all logits of a pair of frames are computed, in one matrix product, because that is faster than gathering each window's
keys. Only the backward pass needs less, so little that it can be kept.

    grid = (F, H, W)                                        # N = F*H*W tokens, S = H*W of them in a frame
    q, k = ...                                              # (1,N,M,D) of one clip, raster order, as attention uses
    pairs = frame_pairs(F, span=4)
    flow, windows = windowed_amf(q, k, grid, pairs)         # (pairs, S, 2): rows and columns, in tokens

A logit is the heads' mean times tau: tau sum_m q_m k_m / (M sqrt(D)). A larger tau picks the best match, a smaller one
averages over many; it suits one model and one way of reducing the heads.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The logits of one chunk of frame pairs, S*S floats each, take at most this many bytes (or one pair, if that is more).
# At any F, the AMF needs at most four times this (logits, softmax, and the gradient of each) beside its inputs, a
# scaled copy of q, the gradients of these three, and its outputs. For the backward pass the windowed flow also keeps
# its softmax, a float for each token and key of its window, and the keys' coordinates, two for each tile and key. The
# dense flow's softmax would be S*S floats a pair, so its chunks are computed again instead.
CHUNK_BYTES = 2**27

Grid = tuple[int, int, int]  # F, H, W
Pair = tuple[int, int]  # source frame i, target frame j


def frame_pairs(frames: int, span: int, anchor_every: int = 1) -> list[Pair]:
    """All (i, j) with 1 <= j - i <= span, both in latent frames; grouped by distance.

    Eq. 3 without i = j, where nothing moves. anchor_every: only i = 0, n, 2n, ... Raises ValueError without any pair.
    """
    if frames < 2 or span < 1:
        raise ValueError(f"need at least 2 latent frames and span >= 1 for motion, got {frames} and {span}")
    pairs = []
    for distance in range(1, min(span, frames - 1) + 1):
        for i in range(0, frames - distance, anchor_every):
            pairs.append((i, i + distance))
    return pairs


def dense_amf(q: Tensor, k: Tensor, grid: Grid, pairs: list[Pair], *, tau: float = 2.0) -> Tensor:
    """Displacement of each token by a softmax over all tokens of the target frame (Eq. 3, window = frame).

    q, k (1,N,M,D); tau > 0 sharpens the softmax. -> flow (len(pairs), S, 2) in tokens; differentiable in q and k.
    Raises ValueError on q and k that do not fit the grid, or pairs that are not frames of it.
    """
    coords = token_coords(grid, q)

    def flow_of(q_i: Tensor, k_j: Tensor) -> Tensor:
        weights = (q_i @ k_j.mT).softmax(-1)  # (P,S,C) x (P,C,S) -> (P,S,S)
        return weights @ coords - coords  # (P,S,S) x (S,2) -> (P,S,2)

    queries, keys = logit_features(q, k, grid, tau)
    return map_pairs(recomputed(flow_of), queries, keys, pairs)


def tile_centers(
    q: Tensor,
    k: Tensor,
    grid: Grid,
    pairs: list[Pair],
    *,
    tile: tuple[int, int] = (3, 4),
    kind: str = "argmax",
    tau: float = 2.0,
) -> Tensor:
    """Position of each tile's representative (its middle token) in the target frame: Eq. 1, then Eq. 4 or Eq. 2.

    q, k (1,N,M,D); tile in tokens, rows by columns; kind "argmax" (Eq. 4) or "soft" (Eq. 2).
    -> centers (len(pairs), tiles, 2), absolute coordinates in tokens, no gradient. "argmax" does not depend on tau;
    "soft" is a mean over the frame, which falls to the frame's middle where the match is unsure.
    Raises ValueError on another kind, an empty tile, or q and k that do not fit the grid.
    """
    if kind not in ("argmax", "soft"):
        raise ValueError(f'kind of centers must be "argmax" or "soft", got {kind!r}')
    if min(tile) < 1:
        raise ValueError(f"tile must be at least 1x1 tokens, got {tile}")
    coords = token_coords(grid, q)
    _, h, w = grid
    rows = (torch.arange(0, h, tile[0], device=q.device) + tile[0] // 2).clamp(max=h - 1)
    columns = (torch.arange(0, w, tile[1], device=q.device) + tile[1] // 2).clamp(max=w - 1)
    representatives = (rows[:, None] * w + columns).flatten()  # (tiles,) token numbers

    def center_of(q_i: Tensor, k_j: Tensor) -> Tensor:
        logits = q_i @ k_j.mT  # (P,tiles,C) x (P,C,S) -> (P,tiles,S)
        if kind == "argmax":
            return coords[logits.argmax(-1)]  # -> (P,tiles,2)
        return logits.softmax(-1) @ coords  # -> (P,tiles,2)

    with torch.no_grad():
        queries, keys = logit_features(q, k, grid, tau)
        return map_pairs(center_of, queries[:, representatives], keys, pairs)


def window_keys(centers: Tensor, grid: Grid, window: int) -> Tensor:
    """Keys of the window around each center: a box of min(window,H) x min(window,W), shifted to lie inside the frame.

    centers (..., 2) absolute, in tokens -> (..., keys) flat token numbers inside the target frame, all distinct.
    """
    _, h, w = grid
    rows = min(window, h)
    columns = min(window, w)
    size = torch.tensor([rows, columns], device=centers.device)
    corner = (centers + 0.5).floor().long() - size // 2  # (..., 2)
    corner = corner.clamp(min=torch.zeros_like(size), max=torch.tensor([h, w], device=centers.device) - size)
    y = corner[..., 0, None] + torch.arange(rows, device=centers.device)  # (..., rows)
    x = corner[..., 1, None] + torch.arange(columns, device=centers.device)  # (..., columns)
    return (y[..., :, None] * w + x[..., None, :]).flatten(-2)  # (..., rows, columns) -> (..., keys)


def windowed_amf(
    q: Tensor,
    k: Tensor,
    grid: Grid,
    pairs: list[Pair],
    *,
    tau: float = 2.0,
    tile: tuple[int, int] = (3, 4),
    window: int = 21,
    centers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Displacement of each token by a softmax over its tile's window in the target frame (Eq. 3).

    q, k (1,N,M,D); tile and window in tokens; centers (len(pairs), tiles, 2) from tile_centers, of this video or of
    another; None: this video's own argmax.
    -> flow (len(pairs), S, 2) in tokens, from each token's own position, wherever its window is; windows
    (len(pairs), tiles, keys), flat token numbers in the target frame. No gradient through the windows' positions.
    Where tiles do not divide the grid, the last ones are smaller. Raises ValueError on sizes that do not fit.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if centers is None:
        centers = tile_centers(q, k, grid, pairs, tile=tile, tau=tau)
    tokens = tile_tokens(grid, tile, q.device)  # (tiles,t)
    slots = raster_slot(grid, tile, q.device)  # (S,)
    expected = (len(pairs), len(tokens), 2)
    if centers.shape != expected:
        raise ValueError(f"centers must be {expected} for tiles {tile}, got {tuple(centers.shape)}")
    windows = window_keys(centers, grid, window)
    coords = token_coords(grid, q)

    def flow_of(q_i: Tensor, k_j: Tensor, keys: Tensor) -> Tensor:
        logits = (q_i @ k_j.mT).unflatten(1, tokens.shape)  # (P,tiles*t,C) x (P,C,S) -> (P,tiles,t,S)
        of_tokens = keys.unsqueeze(2).expand(-1, -1, tokens.shape[1], -1)  # (P,tiles,keys) -> (P,tiles,t,keys)
        inside = _Select.apply(logits, of_tokens)  # (P,tiles,t,S) -> (P,tiles,t,keys)
        target = inside.softmax(-1) @ coords[keys]  # (P,tiles,t,keys) x (P,tiles,keys,2) -> (P,tiles,t,2)
        return target.flatten(1, 2)[:, slots] - coords  # -> (P,tiles*t,2) -> raster order (P,S,2)

    queries, keys = logit_features(q, k, grid, tau)
    queries = queries[:, tokens.flatten()]  # (F,S,C) -> (F,tiles*t,C), tile by tile
    return map_pairs(flow_of, queries, keys, pairs, windows), windows


class _Select(torch.autograd.Function):
    """logits.gather(-1, keys) for distinct keys; PyTorch's own keeps all logits for the backward, for their shape."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, keys: Tensor) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.shape = logits.shape
        return logits.gather(-1, keys)  # (...,S) and (...,keys) -> (...,keys)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keys,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).scatter_(-1, keys, gradient), None  # (...,keys) -> (...,S)


def logit_features(q: Tensor, k: Tensor, grid: Grid, tau: float) -> tuple[Tensor, Tensor]:
    """Queries and keys whose dot product is a logit: q and k (1,N,M,D) -> (F,S,M*D) each, at least float32.

    The product runs over heads and channels at once; the factor tau / (M sqrt(D)) is in the queries.
    Raises ValueError on q and k that do not fit the grid.
    """
    f, h, w = grid
    if q.ndim != 4 or q.shape != k.shape or q.shape[:2] != (1, f * h * w):
        got = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"q and k must be (1, {f * h * w}, heads, width) for grid {grid}, got {got}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = tau / (q.shape[2] * q.shape[3] ** 0.5)
    queries = q[0].to(dtype).flatten(1).unflatten(0, (f, h * w))  # (1,N,M,D) -> (N,M*D) -> (F,S,M*D)
    keys = k[0].to(dtype).flatten(1).unflatten(0, (f, h * w))  # (1,N,M,D) -> (N,M*D) -> (F,S,M*D)
    return scale * queries, keys


def token_coords(grid: Grid, like: Tensor) -> Tensor:
    """Row and column of every token of a frame, raster order: (S,2), on the device of `like`, at least float32."""
    _, h, w = grid
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows = torch.arange(h, device=like.device, dtype=dtype)
    columns = torch.arange(w, device=like.device, dtype=dtype)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (H,W,2) -> (S,2)


def tile_tokens(grid: Grid, tile: tuple[int, int], device: torch.device) -> Tensor:
    """Token numbers of each tile, (tiles, t): the order "tile by tile", in which windowed_amf computes.

    A frame of 2 x 3 tokens in tiles of 2 x 2. The second tile sticks out, so it repeats the last column:

        token numbers    tile by tile                   slots, in raster order
         0  1 | 2  .      slot     0  1  2  3  4  5  6  7      0  1  4
         3  4 | 5  .      token    0  1  3  4  2  2  5  5      2  3  6
                                   -- tile 0 - -- tile 1 -

    A repeated token is computed twice; raster_slot names one slot of each token, and the copy has no effect.
    """
    _, h, w = grid
    rows = torch.arange(_whole_tiles(h, tile[0]), device=device).clamp(max=h - 1)  # repeats the last row
    columns = torch.arange(_whole_tiles(w, tile[1]), device=device).clamp(max=w - 1)  # repeats the last column
    tokens = rows[:, None] * w + columns  # (tile rows * t_h, tile columns * t_w)
    tokens = tokens.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))  # -> (tile rows, t_h, tile columns, t_w)
    return tokens.transpose(1, 2).flatten(0, 1).flatten(1)  # -> (tile rows, tile columns, t_h, t_w) -> (tiles, t)


def raster_slot(grid: Grid, tile: tuple[int, int], device: torch.device) -> Tensor:
    """Slot of each token of a frame in tile_tokens' order, (S,): the inverse, to raster order."""
    _, h, w = grid
    tile_rows = _whole_tiles(h, tile[0]) // tile[0]
    tile_columns = _whole_tiles(w, tile[1]) // tile[1]
    slots = torch.arange(tile_rows * tile_columns * tile[0] * tile[1], device=device)
    slots = slots.reshape(tile_rows, tile_columns, *tile).transpose(1, 2)  # -> (tile rows, t_h, tile columns, t_w)
    return slots.flatten(2).flatten(0, 1)[:h, :w].flatten()  # (rows, columns) of whole tiles -> (H,W) -> (S,)


def _whole_tiles(side: int, tile: int) -> int:
    """`side` tokens, rounded up to whole tiles."""
    return math.ceil(side / tile) * tile


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, but it keeps only its inputs for the backward pass, which runs it again."""
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def map_pairs(
    function: Callable[..., Tensor], queries: Tensor, keys: Tensor, pairs: list[Pair], *extra: Tensor
) -> Tensor:
    """function(queries of frames i, keys of frames j, ...) over all pairs, a chunk of one distance at a time.

    queries (F,n,C), keys (F,S,C), extra (len(pairs), ...) -> (len(pairs), ...). A chunk's logits take at most
    CHUNK_BYTES. Raises ValueError on pairs that are not frames.
    """
    frames = len(queries)
    if not all(0 <= i < frames and 0 <= j < frames for i, j in pairs):
        raise ValueError(f"pairs must be frames in 0..{frames - 1}, got {pairs}")
    logit_bytes = queries.shape[1] * keys.shape[1] * queries.element_size()
    out = []
    start = 0
    for i, j, length in _runs(pairs, limit=max(1, CHUNK_BYTES // logit_bytes)):
        stop = start + length
        of_pairs = [x[start:stop] for x in extra]
        out.append(function(queries[i : i + length], keys[j : j + length], *of_pairs))
        start = stop
    return torch.cat(out)


def _runs(pairs: list[Pair], limit: int) -> Iterator[tuple[int, int, int]]:
    """Split pairs, in order, into runs (i, j), (i+1, j+1), ... of at most `limit`: slices of frames, so no copies."""
    start = 0
    for end in range(1, len(pairs) + 1):
        i, j = pairs[start]
        length = end - start
        if length == limit or end == len(pairs) or pairs[end] != (i + length, j + length):
            yield i, j, length
            start = end
