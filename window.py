"""Attention Motion Flow (AMF): where each token of one frame finds itself in another, read off queries and keys.

Dense AMF compares every token with every token of the other frame. FastVMT (arXiv 2602.05551, Sec. 3.3) first asks
one representative of each tile of tokens where its tile went (Eq. 1, 2, 4), then lets the tile's tokens look only at
a window around that place (Eq. 3). Windows are boxes of distinct keys: at borders they are shifted, never padded.
What a window buys is that far, wrong matches are out of reach (and right ones, should two things change places). It
buys little time: all logits of a pair of frames are computed, in one matrix product, because that is faster than
gathering each window's keys. Only what the backward needs is less, so little that it can be kept.

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

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The logits of one chunk of frame pairs, S*S floats each, take at most this many bytes (or one pair, if that is more).
# At any F, the AMF needs at most four times this (logits, softmax, and the gradient of each) beside its inputs, a
# scaled copy of q, the gradients of these three, and its outputs. For the backward the windowed flow also keeps its
# softmax, a float for each token and key of its window, and the keys' places, two for each tile and key. The dense
# flow's softmax would be S*S floats a pair, so its chunks are computed again instead.
CHUNK_BYTES = 2**27

Grid = tuple[int, int, int]
Pair = tuple[int, int]


def frame_pairs(frames: int, span: int) -> list[Pair]:
    """All (i, j) with 1 <= j - i <= span: Eq. 3 without i = j, where nothing moves. Those of one distance together.

    Raises ValueError if there is none.
    """
    if frames < 2 or span < 1:
        raise ValueError(f"need at least 2 latent frames and span >= 1 for motion, got {frames} and {span}")
    return [(i, i + d) for d in range(1, min(span, frames - 1) + 1) for i in range(frames - d)]


def dense_amf(q: Tensor, k: Tensor, grid: Grid, pairs: list[Pair], *, tau: float = 2.0) -> Tensor:
    """Displacement of each token by a softmax over all tokens of the target frame (Eq. 3, window = frame).

    -> flow (len(pairs), S, 2) in tokens; differentiable in q and k.
    """
    places = _places(grid, q)

    def flow_of(q_i: Tensor, k_j: Tensor) -> Tensor:
        return (q_i @ k_j.mT).softmax(-1) @ places - places  # (P,S,C) x (P,S,C) -> (P,S,S) -> (P,S,2)

    return _by_chunks(_recomputed(flow_of), *_features(q, k, grid, tau), pairs)


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
    """Where the middle token of each tile is found in the target frame: Eq. 1, then Eq. 4, or Eq. 2 if kind="soft".

    -> centers (len(pairs), tiles, 2), absolute positions, no gradient. "argmax" does not depend on tau; "soft"
    is a mean over the frame, which falls to the frame's middle where the match is unsure.
    Raises ValueError on another kind, an empty tile, or q and k that do not fit the grid.
    """
    if kind not in ("argmax", "soft"):
        raise ValueError(f'kind of centers must be "argmax" or "soft", got {kind!r}')
    if min(tile) < 1:
        raise ValueError(f"tile must be at least 1x1 tokens, got {tile}")
    places = _places(grid, q)
    _, h, w = grid
    rows = (torch.arange(0, h, tile[0], device=q.device) + tile[0] // 2).clamp(max=h - 1)
    columns = (torch.arange(0, w, tile[1], device=q.device) + tile[1] // 2).clamp(max=w - 1)
    middle = (rows[:, None] * w + columns).flatten()  # (tiles,) token numbers

    def center_of(q_i: Tensor, k_j: Tensor) -> Tensor:
        logits = q_i @ k_j.mT  # (P,tiles,C) x (P,S,C) -> (P,tiles,S)
        return places[logits.argmax(-1)] if kind == "argmax" else logits.softmax(-1) @ places  # -> (P,tiles,2)

    with torch.no_grad():
        queries, keys = _features(q, k, grid, tau)
        return _by_chunks(center_of, queries[:, middle], keys, pairs)


def place_windows(centers: Tensor, grid: Grid, window: int) -> Tensor:
    """Keys of the window around each center: a box of min(window,H) x min(window,W), shifted to lie inside the frame.

    centers (..., 2) absolute -> (..., keys) flat token numbers inside the target frame, all distinct.
    """
    _, h, w = grid
    size = torch.tensor([min(window, h), min(window, w)], device=centers.device)
    corner = (centers + 0.5).floor().long() - size // 2  # (..., 2)
    corner = corner.clamp(min=torch.zeros_like(size), max=torch.tensor([h, w], device=centers.device) - size)
    rows = corner[..., 0, None] + torch.arange(min(window, h), device=centers.device)  # (..., rows)
    columns = corner[..., 1, None] + torch.arange(min(window, w), device=centers.device)  # (..., columns)
    return (rows[..., :, None] * w + columns[..., None, :]).flatten(-2)  # (..., rows, columns) -> (..., keys)


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

    centers (len(pairs), tiles, 2) from tile_centers, of this video or of another; None: this video's own argmax.
    -> flow (len(pairs), S, 2), from each token's own place, wherever its window is; windows (len(pairs), tiles, keys),
    flat token numbers in the target frame. No gradient through the windows' places. Where tiles do not divide the
    grid, the last ones are smaller. Raises ValueError on sizes that do not fit.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if centers is None:
        centers = tile_centers(q, k, grid, pairs, tile=tile, tau=tau)
    tokens, slots = _tile_tokens(grid, tile, q.device)
    if centers.shape != (len(pairs), len(tokens), 2):
        raise ValueError(f"centers must be {(len(pairs), len(tokens), 2)} for tiles {tile}, got {tuple(centers.shape)}")
    windows = place_windows(centers, grid, window)
    places = _places(grid, q)

    def flow_of(q_i: Tensor, k_j: Tensor, keys: Tensor) -> Tensor:
        logits = (q_i @ k_j.mT).unflatten(1, tokens.shape)  # (P,tiles*t,C) x (P,S,C) -> (P,tiles,t,S)
        inside = _Select.apply(logits, keys.unsqueeze(2).expand(-1, -1, tokens.shape[1], -1))  # -> (P,tiles,t,keys)
        found = inside.softmax(-1) @ places[keys]  # (P,tiles,t,keys) x (P,tiles,keys,2) -> (P,tiles,t,2)
        return found.flatten(1, 2)[:, slots] - places  # -> (P,tiles*t,2) -> raster (P,S,2)

    queries, keys = _features(q, k, grid, tau)
    queries = queries[:, tokens.flatten()]  # (F,S,C) -> (F,tiles*t,C), tile by tile
    return _by_chunks(flow_of, queries, keys, pairs, windows), windows


class _Select(torch.autograd.Function):
    """logits.gather(-1, keys) for distinct keys; PyTorch's own keeps all logits for the backward, for their shape."""

    @staticmethod
    def forward(ctx, logits: Tensor, keys: Tensor) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.shape = logits.shape
        return logits.gather(-1, keys)  # (...,S) and (...,keys) -> (...,keys)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (keys,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).scatter_(-1, keys, gradient), None  # (...,keys) -> (...,S)


def _features(q: Tensor, k: Tensor, grid: Grid, tau: float) -> tuple[Tensor, Tensor]:
    """q and k (1,N,M,D) -> (F,S,M*D) each, at least float32, with all factors of a logit in q.

    So a dot product over M*D is a logit: the sum over heads and channels, times tau / (M sqrt(D)).
    """
    f, h, w = grid
    if q.ndim != 4 or q.shape != k.shape or q.shape[:2] != (1, f * h * w):
        got = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"q and k must be (1, {f * h * w}, heads, width) for grid {grid}, got {got}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = tau / (q.shape[2] * q.shape[3] ** 0.5)
    q, k = (x[0].to(dtype).flatten(1).unflatten(0, (f, h * w)) for x in (q, k))  # (1,N,M,D) -> (N,M*D) -> (F,S,M*D)
    return scale * q, k


def _places(grid: Grid, like: Tensor) -> Tensor:
    """(S,2) row and column of every token, raster order."""
    _, h, w = grid
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows, columns = (torch.arange(n, device=like.device, dtype=dtype) for n in (h, w))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (H,W,2) -> (S,2)


def _tile_tokens(grid: Grid, tile: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens of each tile (tiles, t), and each token's slot in that list (S,).

    Tiles at the border are filled with copies of the frame's last row or column, which have no slot and so no effect.
    A frame of 2 x 3 in tiles of 2 x 2: tokens [[0, 1, 3, 4], [2, 2, 5, 5]], slots [0, 1, 4, 2, 3, 6].
    """
    _, h, w = grid
    (t_h, t_w), n_h, n_w = tile, math.ceil(h / tile[0]), math.ceil(w / tile[1])
    rows = torch.arange(n_h * t_h, device=device).reshape(n_h, 1, t_h, 1)
    columns = torch.arange(n_w * t_w, device=device).reshape(1, n_w, 1, t_w)
    tokens = (rows.clamp(max=h - 1) * w + columns.clamp(max=w - 1)).flatten(0, 1).flatten(1)  # -> (tiles, t)
    order = torch.arange(tokens.numel(), device=device).reshape(n_h, n_w, t_h, t_w).transpose(1, 2)
    slots = order.flatten(2).flatten(0, 1)[:h, :w].flatten()  # (n_h*t_h, n_w*t_w) -> (S,)
    return tokens, slots


def _recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, but it keeps only its inputs for the backward, which runs it again."""
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def _by_chunks(function: Callable[..., Tensor], q: Tensor, k: Tensor, pairs: list[Pair], *extra: Tensor) -> Tensor:
    """function(q of frames i, k of frames j, ...) over all pairs, a chunk of one distance at a time.

    q (F,queries,C), k (F,S,C), extra (len(pairs), ...) -> (len(pairs), ...).
    """
    frames = len(q)
    if not all(0 <= i < frames and 0 <= j < frames for i, j in pairs):
        raise ValueError(f"pairs must be frames in 0..{frames - 1}, got {pairs}")
    limit = max(1, CHUNK_BYTES // (q.shape[1] * k.shape[1] * q.element_size()))
    out, start = [], 0
    for i, j, n in _runs(pairs, limit):
        inputs = (q[i : i + n], k[j : j + n], *(x[start : start + n] for x in extra))
        out.append(function(*inputs))
        start += n
    return torch.cat(out)


def _runs(pairs: list[Pair], limit: int) -> Iterator[tuple[int, int, int]]:
    """Split pairs, in order, into runs (i, j), (i+1, j+1), ... of at most `limit`: slices of frames, so no copies."""
    start = 0
    for end in range(1, len(pairs) + 1):
        i, j = pairs[start]
        n = end - start
        if n == limit or end == len(pairs) or pairs[end] != (i + n, j + n):
            yield i, j, n
            start = end
