"""The method in plain loops, one token, tile and pair at a time: what the fast modules are compared with.

Follows the equations of FastVMT (arXiv 2602.05551) symbol by symbol; slow, and too plain to be wrong.
"""

import math

import torch
import torch.nn.functional as F
from naive import naive

_losses = naive("08_losses")  # written once, in the notebook
amf_loss, window_loss = _losses.amf_loss, _losses.window_loss


def logits(q, k, u, s):
    """Mean over heads of the scaled dot product of query token u and key token s; q, k (1,N,M,D)."""
    heads, width = q.shape[2:]
    return sum(q[0, u, m] @ k[0, s, m] / math.sqrt(width) for m in range(heads)) / heads


def place(s, grid):
    """Row and column of token s of a frame."""
    return divmod(s, grid[2])


def softmax_flow(q, k, grid, i, j, u, keys, tau):
    """Expected position of frame i's token u among the tokens `keys` of frame j, minus its own position."""
    size = grid[1] * grid[2]
    weights = F.softmax(torch.stack([tau * logits(q, k, i * size + u, j * size + s) for s in keys]), dim=0)
    rows = sum(a * place(s, grid)[0] for a, s in zip(weights, keys)) - place(u, grid)[0]
    columns = sum(a * place(s, grid)[1] for a, s in zip(weights, keys)) - place(u, grid)[1]
    return torch.stack([rows, columns])


def dense_amf(q, k, grid, pairs, tau):
    size = grid[1] * grid[2]
    return torch.stack(
        [
            torch.stack([softmax_flow(q, k, grid, i, j, u, list(range(size)), tau) for u in range(size)])
            for i, j in pairs
        ]
    )


def tiles_of(grid, tile):
    """Tokens and representative of each tile, raster order; tiles at the lower and right border may be smaller."""
    _, h, w = grid
    tiles = []
    for top in range(0, h, tile[0]):
        for left in range(0, w, tile[1]):
            tokens = [y * w + x for y in range(top, min(top + tile[0], h)) for x in range(left, min(left + tile[1], w))]
            middle = min(top + tile[0] // 2, h - 1) * w + min(left + tile[1] // 2, w - 1)
            tiles.append((tokens, middle))
    return tiles


def tile_centres(q, k, grid, pairs, tile, kind="argmax", tau=2.0):
    size = grid[1] * grid[2]
    centres = []
    for i, j in pairs:
        for _, middle in tiles_of(grid, tile):
            row = torch.stack([tau * logits(q, k, i * size + middle, j * size + s) for s in range(size)])
            if kind == "argmax":
                centres.append(torch.tensor(place(int(row.argmax()), grid), dtype=q.dtype))
            else:
                centres.append(
                    softmax_flow(q, k, grid, i, j, middle, list(range(size)), tau) + torch.tensor(place(middle, grid))
                )
    return torch.stack(centres).reshape(len(pairs), -1, 2)


def window_keys(centre, grid, window):
    """The window's keys: a box around the rounded centre, pushed back into the frame."""
    _, h, w = grid
    height, width = min(window, h), min(window, w)
    top = min(max(math.floor(float(centre[0]) + 0.5) - height // 2, 0), h - height)
    left = min(max(math.floor(float(centre[1]) + 0.5) - width // 2, 0), w - width)
    return [y * w + x for y in range(top, top + height) for x in range(left, left + width)]


def windowed_amf(q, k, grid, pairs, tau, tile, window, centres):
    flows, windows = [], []
    for n, (i, j) in enumerate(pairs):
        flow = [None] * (grid[1] * grid[2])
        for p, (tokens, _) in enumerate(tiles_of(grid, tile)):
            keys = window_keys(centres[n, p], grid, window)
            windows.append(torch.tensor(keys))
            for u in tokens:
                flow[u] = softmax_flow(q, k, grid, i, j, u, keys, tau)
        flows.append(torch.stack(flow))
    return torch.stack(flows), torch.stack(windows).reshape(len(pairs), -1, len(windows[0]))


def optimise(x, gradient, steps, interval, lr):
    """AdamW without decay, betas .9 and .999, by its formula; gradient(x) is asked at steps 0, interval, ..."""
    m = v = torch.zeros_like(x)
    for j in range(steps):
        if j % interval == 0:
            g = gradient(x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = lr[0] + (lr[1] - lr[0]) * j / max(steps - 1, 1)
        x = x - rate * (m / (1 - 0.9 ** (j + 1))) / ((v / (1 - 0.999 ** (j + 1))).sqrt() + 1e-8)
    return x
