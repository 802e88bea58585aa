"""A network of the VAE over a whole clip: tile by tile in space, chunk by chunk in time, in bounded memory."""

from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

Progress = Callable[[list], Iterable]  # wraps a list of steps, as tqdm does


class Tile(NamedTuple):
    """One tile of one side of the frame."""

    source: slice  # where it lies in the network's input
    target: slice  # where it lies in the network's output
    weight: Tensor  # of each of its outputs, in (0,1]


def tile_slices(source: int, target: int, tile: int | None) -> list[Tile]:
    """Cut one side of the frame into tiles: it is `source` long before a network and `target` long after it.

    `tile` is in pixels, the longer unit of the two; neighbors overlap by a quarter or more; None makes a single tile.
    Weights are linear ramps over the overlap, divided by their sum over all tiles (so a single tile weighs exactly 1).
    """
    side = max(source, target)
    tile = min(tile or side, side)
    overlap = tile // 4
    ramp = (torch.arange(tile * target // side) + 0.5) * side / (overlap * target)
    weight = torch.minimum(ramp, ramp.flip(0)).clamp(max=1)
    total = torch.zeros(target)
    slices = []
    for begin in range(0, side - overlap, tile - overlap):
        start = min(begin, side - tile)  # the last tile ends where the side does
        stop = start + tile
        from_source = slice(start * source // side, stop * source // side)
        to_target = slice(start * target // side, stop * target // side)
        total[to_target] += weight
        slices.append((from_source, to_target))
    return [Tile(from_source, to_target, weight / total[to_target]) for from_source, to_target in slices]


def apply_in_chunks(
    network: nn.Module,
    clip: Tensor,
    chunks: list[int],
    shape: tuple[int, ...],
    tile: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Run a causal network, (x, cache) -> (y, cache), over a clip.

    clip (B,C,T,H,W) of any float dtype; chunks: numbers of frames, T in all; shape (B,C',T',H',W') of the result;
    tile: pixels, see tile_slices; progress wraps the list of steps. -> float32 of the given shape.
    Each tile sees the whole clip before the next one starts, so only one tile's cache is ever in memory.
    """
    out = torch.zeros(shape, device=clip.device)
    dtype = next(network.parameters()).dtype
    rows = tile_slices(clip.shape[3], shape[3], tile)
    columns = tile_slices(clip.shape[4], shape[4], tile)
    steps = list(product(rows, columns, enumerate(clip.split(chunks, dim=2))))
    shown: Iterable = steps
    if progress is not None:
        shown = progress(steps)
    cache = None
    start = 0
    for row, column, (index, chunk) in shown:
        if index == 0:  # a new tile
            cache = None
            start = 0
        part = chunk[..., row.source, column.source]  # the chunk's frames, within this tile
        y, cache = network(part.to(dtype), cache)
        weight = torch.outer(row.weight, column.weight).to(y.device)  # (H',W') of the tile
        stop = start + y.shape[2]
        region = out[:, :, start:stop, row.target, column.target]
        region += y * weight
        start = stop
    return out
