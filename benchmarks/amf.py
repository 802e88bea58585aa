"""Attention Motion Flow and its gradient: windowed beside dense, and how both grow with the number of latent frames.

Dense guidance as DiTFlow's compares all F*F ordered pairs of frames: "at once" does it in one product, as plain as can
be; "all pairs" is our dense_amf on them, in chunks. "same pairs" is dense_amf on the pairs of the windowed flow, which
shows what a window itself costs. "gathered keys" is the windowed flow as the paper describes it, from a copy of each
window's keys; ours computes all logits and selects. Windows are placed once per run, so that is a row of its own.
Operations are those of the logits that a way computes, forward and backward, in float32.
"""

from collections.abc import Callable
from math import prod
from unittest.mock import patch

import torch
from torch import Tensor

import window
from benchmarks.common import Bench, available_bytes, difference, parser, slope
from fastvmt import MotionConfig
from window import (
    Grid,
    Pair,
    dense_amf,
    frame_pairs,
    logit_features,
    map_pairs,
    place_windows,
    raster_slot,
    recomputed,
    tile_centers,
    tile_tokens,
    token_coords,
    windowed_amf,
)

Flow = Callable[[Tensor, Tensor], Tensor]
AT_ONCE, ALL, SAME = "dense, all at once", "dense, all pairs", "dense, same pairs"
GATHERED, WINDOWED = "gathered keys", "windowed"


def all_pairs(frames: int) -> list[Pair]:
    """All ordered pairs, those of one distance together."""
    return [(i, i + d) for d in range(1 - frames, frames) for i in range(max(0, -d), min(frames, frames - d))]


def plain_amf(q: Tensor, k: Tensor, grid: Grid, tau: float) -> Tensor:
    """Dense flow of all ordered pairs in one product: (1,N,M,D) twice -> (F,F,S,2), source by target."""
    f, h, w = grid
    scale = tau / (q.shape[2] * q.shape[3] ** 0.5)
    logits = (scale * q[0].flatten(1)) @ k[0].flatten(1).mT  # (N,C) x (C,N) -> (N,N)
    places = torch.cartesian_prod(torch.arange(h, device=q.device), torch.arange(w, device=q.device)).to(q.dtype)
    found = logits.unflatten(1, (f, h * w)).softmax(-1) @ places  # -> (N,F,S) -> (N,F,2)
    return found.unflatten(0, (f, h * w)).transpose(1, 2) - places  # -> (F,S,F,2) -> (F,F,S,2)


def gathered_amf(q: Tensor, k: Tensor, grid: Grid, pairs: list[Pair], centers: Tensor, c: MotionConfig) -> Tensor:
    """windowed_amf by copying each window's keys, one pair of frames at a time (350 MB at full size)."""
    tokens, slots = tile_tokens(grid, c.tile, q.device), raster_slot(grid, c.tile, q.device)
    places = token_coords(grid, q)

    def flow_of(q_i: Tensor, k_j: Tensor, keys: Tensor) -> Tensor:
        near = k_j[0].index_select(0, keys.flatten()).unflatten(0, keys.shape[1:])  # (1,S,C) -> (tiles,keys,C)
        weights = (q_i[0].unflatten(0, tokens.shape) @ near.mT).softmax(-1)  # (1,tiles*t,C) -> (tiles,t,keys)
        found = (weights.unsqueeze(2) @ places[keys[0]].unsqueeze(1)).flatten(0, 2)  # -> (tiles*t,2)
        return (found[slots] - places).unsqueeze(0)  # -> (1,S,2)

    queries, keys = logit_features(q, k, grid, c.tau)
    windows = place_windows(centers, grid, c.window)
    with patch.object(window, "CHUNK_BYTES", 1):
        return map_pairs(recomputed(flow_of), queries[:, tokens.flatten()], keys, pairs, windows)


def ways(grid: Grid, centers: Tensor, c: MotionConfig) -> dict[str, Flow]:
    """Every way to a flow; the first of all pairs that can be measured is the reference."""
    pairs, every = frame_pairs(grid[0], c.span), all_pairs(grid[0])
    options = {"tau": c.tau, "tile": c.tile, "window": c.window, "centers": centers}
    return {
        AT_ONCE: lambda q, k: plain_amf(q, k, grid, c.tau),
        ALL: lambda q, k: dense_amf(q, k, grid, every, tau=c.tau),
        SAME: lambda q, k: dense_amf(q, k, grid, pairs, tau=c.tau),
        GATHERED: lambda q, k: gathered_amf(q, k, grid, pairs, centers, c),
        WINDOWED: lambda q, k: windowed_amf(q, k, grid, pairs, **options)[0],
    }


def pull(flow: Flow, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward of a flow."""
    q, k = (x.detach().requires_grad_() for x in (q, k))
    return torch.autograd.grad(flow(q, k).square().sum(), (q, k))


def check(device: torch.device) -> None:
    """On a small grid, both dense and both windowed ways pull the same."""
    grid, c = (4, 7, 10), MotionConfig(window=5)
    q, k = torch.randn(2, 1, prod(grid), 2, 8, device=device)
    centers = tile_centers(q, k, grid, frame_pairs(grid[0], c.span))
    pulls = {name: torch.cat(pull(flow, q, k)) for name, flow in ways(grid, centers, c).items()}
    for a, b in ((AT_ONCE, ALL), (GATHERED, WINDOWED)):
        assert difference(pulls[a], pulls[b]) < 1e-5, f"{a} and {b} differ"


def operations(grid: Grid, channels: int, c: MotionConfig) -> dict[str, int]:
    """Of the products of queries and keys, three times: forward, and the gradient of each."""
    f, s = grid[0], grid[1] * grid[2]
    pairs, keys = len(frame_pairs(f, c.span)), min(c.window, grid[1]) * min(c.window, grid[2])
    logits = {AT_ONCE: f * f * s * s, ALL: f * f * s * s, SAME: pairs * s * s, GATHERED: pairs * s * keys}
    return {name: 6 * channels * n for name, n in (logits | {WINDOWED: pairs * s * s}).items()}


def stated_bound(q: Tensor, grid: Grid, windows: Tensor) -> float:
    """GB that window.py says its flow takes at most: 4 chunks, copy of q, 3 gradients, outputs; softmax and places."""
    s, (pairs, _, keys) = grid[1] * grid[2], windows.shape
    needed = 4 * max(window.CHUNK_BYTES, 4 * s * s) + 4 * q.nbytes + 8 * pairs * s + windows.nbytes
    return (needed + 4 * pairs * s * keys + windows.nbytes) / 1e9


def time_frames(bench: Bench, frames: int, given_up: set[str]) -> None:
    """The rows of one clip; a way that took too long, or too much memory, is given up for longer ones."""
    c, heads = bench.size.motion, bench.size.dit.num_heads
    grid = (frames, *bench.size.grid[1:])
    q, k = torch.randn(2, 1, prod(grid), heads, bench.size.dit.dim // heads, device=bench.device)
    pairs = frame_pairs(frames, c.span)
    centers = tile_centers(q, k, grid, pairs, tile=c.tile, tau=c.tau)
    counted, reference = operations(grid, bench.size.dit.dim, c), None
    for name, flow in ways(grid, centers, c).items():
        row, needed = f"{name}, F={frames}", 3 * 4 * prod(grid) ** 2 if name == AT_ONCE else 0
        if name in given_up or needed > available_bytes(bench.device):
            bench.skip(row, "took too long with fewer frames" if name in given_up else f"needs {needed / 1e9:.0f} GB")
            continue
        note = f"{len(pairs) if name in (SAME, GATHERED, WINDOWED) else frames**2} pairs"
        if name == WINDOWED:
            bound = stated_bound(q, grid, place_windows(centers, grid, c.window))
            note += f", stated bound {bound:.3g} GB"
        options = {"to": reference, "operations": counted[name], "dtype": torch.float32, "note": note}
        bench.row(row, lambda flow=flow: pull(flow, q, k), **options)
        seconds = bench.rows[row]["seconds"]
        if name in (AT_ONCE, ALL) and reference is None and seconds:
            reference = row
        if seconds is None or seconds > bench.args.limit:
            given_up.add(name)
    bench.row(f"windows placed, F={frames}", lambda: tile_centers(q, k, grid, pairs, tile=c.tile), note="once per run")


def exponents(bench: Bench) -> dict[str, float]:
    """How time and memory grow with F."""
    found = {}
    for name in (AT_ONCE, ALL, SAME, GATHERED, WINDOWED):
        rows = [(f, row) for f in bench.args.frames if (row := bench.rows[f"{name}, F={f}"])["seconds"]]
        if len(rows) > 1:
            for key, label in (("seconds", "time"), ("peak_gb", "memory")):
                found[f"{name}, exponent of {label}"] = slope([(f, row[key]) for f, row in rows])
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure every way at every number of frames, and print."""
    p = parser(__doc__)
    p.add_argument("--frames", type=int, nargs="+", default=[21], help="latent frames F, ascending (21)")
    p.add_argument(
        "--limit", type=float, default=10, help="seconds after which a way gets no more frames (%(default)s)"
    )
    bench, given_up = Bench("amf", p.parse_args(argv)), set()
    check(bench.device)
    for frames in bench.args.frames:
        time_frames(bench, frames, given_up)
    bench.facts |= exponents(bench)
    bench.finish()


if __name__ == "__main__":
    main()
