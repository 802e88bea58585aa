"""Attention Motion Flow and its gradient: windowed beside dense, and how both grow with the number of latent frames.

Dense guidance as DiTFlow's compares all F*F ordered pairs of frames: "at once" does it in one product, as plain as can
be; "all pairs" is our dense_amf on them, in chunks. "same pairs" is dense_amf on the pairs of the windowed flow, which
shows what a window itself costs. "gathered keys" is the windowed flow as the paper describes it, from a copy of each
window's keys; ours computes all logits and selects. Windows are placed once per run, so that is a row of its own.
Operations are those of the logits that a method computes, forward and backward, in float32.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.speed.bench import Bench, build_parser
from benchmarks.speed.measure import available_bytes, difference, exponent
from fastvmt import MotionConfig
from wan_mini.runs.cli import run
from window import (
    CHUNK_BYTES,
    Grid,
    Pair,
    dense_amf,
    frame_pairs,
    logit_features,
    raster_slot,
    tile_centers,
    tile_tokens,
    token_coords,
    window_keys,
    windowed_amf,
)

Flow = Callable[[Tensor, Tensor], Tensor]  # q, k -> displacements
AT_ONCE = "dense, all at once"
ALL_PAIRS = "dense, all pairs"
SAME_PAIRS = "dense, same pairs"
GATHERED = "gathered keys"
WINDOWED = "windowed"
METHODS = (AT_ONCE, ALL_PAIRS, SAME_PAIRS, GATHERED, WINDOWED)


def all_pairs(frames: int) -> list[Pair]:
    """All ordered pairs, those of one distance together."""
    pairs = []
    for distance in range(1 - frames, frames):
        starts = range(max(0, -distance), min(frames, frames - distance))
        pairs += [(i, i + distance) for i in starts]
    return pairs


def plain_amf(q: Tensor, k: Tensor, grid: Grid, tau: float) -> Tensor:
    """Dense flow of all ordered pairs in one product: (1,N,M,D) twice -> (F,F,S,2), source by target."""
    frames = grid[0]
    tokens = grid[1] * grid[2]
    scale = tau / (q.shape[2] * q.shape[3] ** 0.5)
    logits = (scale * q[0].flatten(1)) @ k[0].flatten(1).mT  # (N,C) x (C,N) -> (N,N)
    coordinates = token_coords(grid, q)  # (S,2)
    matches = logits.unflatten(1, (frames, tokens)).softmax(-1) @ coordinates  # (N,N) -> (N,F,S) -> (N,F,2)
    matches = matches.unflatten(0, (frames, tokens)).transpose(1, 2)  # (N,F,2) -> (F,S,F,2) -> (F,F,S,2)
    return matches - coordinates


def gathered_amf(q: Tensor, k: Tensor, grid: Grid, pairs: list[Pair], centers: Tensor, config: MotionConfig) -> Tensor:
    """windowed_amf by copying each window's keys, one pair of frames at a time (350 MB at full size).

    q, k (1,N,M,D) -> (pairs,S,2); as in windowed_amf, a backward computes each pair again.
    """
    tiles = tile_tokens(grid, config.tile, q.device)  # (tiles,t)
    slots = raster_slot(grid, config.tile, q.device)  # (S,)
    coordinates = token_coords(grid, q)  # (S,2)
    queries, keys = logit_features(q, k, grid, config.tau)  # (1,N,M,D) -> (F,S,C) each
    queries = queries[:, tiles.flatten()]  # (F,S,C) -> (F,tiles*t,C)
    windows = window_keys(centers, grid, config.window)  # (pairs,tiles,keys)

    def flow_of_pair(query: Tensor, key: Tensor, window: Tensor) -> Tensor:
        near = key.index_select(0, window.flatten()).unflatten(0, window.shape)  # (S,C) -> (tiles,keys,C)
        weights = (query.unflatten(0, tiles.shape) @ near.mT).softmax(-1)  # (tiles*t,C) -> (tiles,t,keys)
        matches = weights.unsqueeze(2) @ coordinates[window].unsqueeze(1)  # -> (tiles,t,1,2)
        return matches.flatten(0, 2)[slots] - coordinates  # (tiles,t,1,2) -> (tiles*t,2) -> (S,2)

    flows = []
    for (i, j), window in zip(pairs, windows, strict=True):
        flow = checkpoint(flow_of_pair, queries[i], keys[j], window, use_reentrant=False, preserve_rng_state=False)
        flows.append(flow)
    return torch.stack(flows)  # pairs x (S,2) -> (pairs,S,2)


def flows_by_method(grid: Grid, centers: Tensor, config: MotionConfig) -> dict[str, Flow]:
    """Every method by its name; the first of all pairs that can be measured is the reference."""
    pairs = frame_pairs(grid[0], config.span)
    every_pair = all_pairs(grid[0])
    tau = config.tau

    def windowed(q: Tensor, k: Tensor) -> Tensor:
        flow, _ = windowed_amf(q, k, grid, pairs, tau=tau, tile=config.tile, window=config.window, centers=centers)
        return flow

    return {
        AT_ONCE: lambda q, k: plain_amf(q, k, grid, tau),
        ALL_PAIRS: lambda q, k: dense_amf(q, k, grid, every_pair, tau=tau),
        SAME_PAIRS: lambda q, k: dense_amf(q, k, grid, pairs, tau=tau),
        GATHERED: lambda q, k: gathered_amf(q, k, grid, pairs, centers, config),
        WINDOWED: windowed,
    }


def forward_backward(flow: Flow, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a flow's sum of squares with respect to q and k."""
    q = q.detach().requires_grad_()
    k = k.detach().requires_grad_()
    return torch.autograd.grad(flow(q, k).square().sum(), (q, k))


def check_gradients(device: torch.device) -> None:
    """On a small grid, both dense and both windowed methods have the same gradients."""
    grid = (4, 7, 10)
    config = MotionConfig(window=5)
    q, k = torch.randn(2, 1, prod(grid), 2, 8, device=device)
    centers = tile_centers(q, k, grid, frame_pairs(grid[0], config.span))
    gradients = {}
    for name, flow in flows_by_method(grid, centers, config).items():
        gradients[name] = torch.cat(forward_backward(flow, q, k))
    for a, b in ((AT_ONCE, ALL_PAIRS), (GATHERED, WINDOWED)):
        assert difference(gradients[a], gradients[b]) < 1e-5, f"{a} and {b} differ"


def logit_operations(grid: Grid, channels: int, config: MotionConfig) -> dict[str, int]:
    """Of the products of queries and keys, three times: forward, and the gradient of each."""
    frames, rows, columns = grid
    tokens = rows * columns
    pairs = len(frame_pairs(frames, config.span))
    window = min(config.window, rows) * min(config.window, columns)
    logits = {
        AT_ONCE: frames**2 * tokens**2,
        ALL_PAIRS: frames**2 * tokens**2,
        SAME_PAIRS: pairs * tokens**2,
        GATHERED: pairs * tokens * window,
        WINDOWED: pairs * tokens**2,
    }
    return {name: 6 * channels * count for name, count in logits.items()}


def stated_bound(q: Tensor, grid: Grid, windows: Tensor) -> float:
    """GB that window.py says its flow takes at most."""
    tokens = grid[1] * grid[2]
    pairs, _, keys = windows.shape
    chunks = 4 * max(CHUNK_BYTES, 4 * tokens**2)  # logits, softmax, and the gradient of each
    copies = 4 * q.nbytes  # scaled q, and three gradients
    outputs = 8 * pairs * tokens + windows.nbytes
    softmax = 4 * pairs * tokens * keys
    coordinates = windows.nbytes  # two floats for each 8-byte index of a key
    return (chunks + copies + outputs + softmax + coordinates) / 1e9


def reason_to_skip(bench: Bench, name: str, grid: Grid, too_slow: set[str]) -> str | None:
    """Why a method is not measured here, if it is not."""
    if name in too_slow:
        return "took too long with fewer frames"
    needed = 3 * 4 * prod(grid) ** 2
    if name == AT_ONCE and needed > available_bytes(bench.device):
        return f"needs {needed / 1e9:.0f} GB"
    return None


def time_frames(bench: Bench, frames: int, too_slow: set[str]) -> None:
    """The rows of one clip; a method that took too long, or too much memory, is too slow for longer ones."""
    config = bench.size.motion
    heads = bench.size.dit.num_heads
    grid = (frames, *bench.size.grid[1:])
    q, k = torch.randn(2, 1, prod(grid), heads, bench.size.dit.dim // heads, device=bench.device)
    pairs = frame_pairs(frames, config.span)
    centers = tile_centers(q, k, grid, pairs, tile=config.tile, tau=config.tau)
    bound = stated_bound(q, grid, window_keys(centers, grid, config.window))
    notes = dict.fromkeys((SAME_PAIRS, GATHERED), f"{len(pairs)} pairs")
    notes |= dict.fromkeys((AT_ONCE, ALL_PAIRS), f"{frames**2} pairs")
    notes[WINDOWED] = f"{len(pairs)} pairs, stated bound {bound:.3g} GB"
    operations = logit_operations(grid, bench.size.dit.dim, config)
    reference = None
    for name, flow in flows_by_method(grid, centers, config).items():
        row = f"{name}, F={frames}"
        reason = reason_to_skip(bench, name, grid, too_slow)
        if reason is not None:
            bench.skip(row, reason)
            continue
        call = partial(forward_backward, flow, q, k)
        options: dict[str, Any] = {"operations": operations[name], "dtype": torch.float32, "note": notes[name]}
        bench.row(row, call, reference=reference, **options)
        seconds = bench.rows[row]["seconds"]
        if seconds is None or seconds > bench.args.limit:
            too_slow.add(name)
        if name in (AT_ONCE, ALL_PAIRS) and reference is None and seconds:
            reference = row
    find_centers = partial(tile_centers, q, k, grid, pairs, tile=config.tile)
    bench.row(f"windows placed, F={frames}", find_centers, note="once per run")


def exponents(bench: Bench) -> dict[str, float]:
    """How time and memory grow with F."""
    values = {}
    for name in METHODS:
        seconds = []
        memory = []
        for frames in bench.args.frames:
            row = bench.rows[f"{name}, F={frames}"]
            if row["seconds"]:
                seconds.append((frames, row["seconds"]))
                memory.append((frames, row["peak_gb"]))
        if len(seconds) > 1:
            values[f"{name}, exponent of time"] = exponent(seconds)
            values[f"{name}, exponent of memory"] = exponent(memory)
    return values


def parse_args(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[21], help="latent frames F, ascending (21)")
    limit = "seconds after which a method gets no more frames (%(default)s)"
    parser.add_argument("--limit", type=float, default=10, help=limit)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure every method at every number of frames, and print."""
    bench = Bench("amf", parse_args(argv))
    check_gradients(bench.device)
    too_slow: set[str] = set()
    for frames in bench.args.frames:
        time_frames(bench, frames, too_slow)
    bench.results |= exponents(bench)
    bench.finish()


if __name__ == "__main__":
    raise SystemExit(run(main))
