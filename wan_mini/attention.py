"""Attention over all heads, the rotary position embedding (RoPE) of its queries and keys, and whose tokens those are.

Shapes: q (B,N,M,D), k and v (B,L,M,D): M heads of width D, not yet moved to the front.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cosine and sine of rope_table, each (N,1,D/2) float32
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B,N,M,D), k and v (B,L,M,D) -> (B,N,C)

PLAIN_LOGITS = 2**24  # up to so many logits, of two bytes each, are held at once by plain_attention


def rope_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, times: Sequence[float] | None = None
) -> Rope:
    """Cosine and sine of every token's 3D rotary angles, each (N, 1, D/2) float32; grid (F,H,W), head_dim D.

    times: positions of the F latent frames, real numbers; None means 0, 1, ..., F-1.
    The D/2 channel pairs are split unevenly: a third (rounded down) each for rows and columns, the rest for time.
    Source: RoPE (arXiv 2104.09864), one axis after the other; the split is Wan's.
    """
    third = head_dim // 6
    pairs = (head_dim // 2 - 2 * third, third, third)
    positions = [torch.arange(size, dtype=torch.float64) for size in grid]
    if times is not None:
        positions[0] = torch.tensor(times, dtype=torch.float64)
    tables = []
    for wave in (torch.cos, torch.sin):
        axes = []
        for axis, (size, n) in enumerate(zip(grid, pairs, strict=True)):
            frequencies = 10000.0 ** -(torch.arange(n, dtype=torch.float64) / n)
            values = wave(torch.outer(positions[axis], frequencies)).float().to(device)
            shape = [1, 1, 1, n]
            shape[axis] = size
            axes.append(values.reshape(shape).expand(*grid, n))  # (size, n) -> (F,H,W, n)
        tables.append(torch.cat(axes, dim=-1).flatten(0, 2).unsqueeze(1))  # (F,H,W, D/2) -> (N, 1, D/2)
    return tables[0], tables[1]


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each neighboring channel pair of x (B,N,M,D), float32, by its token's angles -> (B,N,M,D)."""
    cos, sin = rope  # (N,1,D/2) each
    pairs = x.unflatten(-1, (-1, 2))  # (B,N,M,D) -> (B,N,M,D/2,2)
    if x.device.type == "cpu":  # one pass over memory instead of seven
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))  # (B,N,M,D/2,2)
    else:  # the same numbers, in a form that torch.compile can fuse
        first, second = pairs.unbind(-1)  # (B,N,M,D/2) each
        rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)  # (B,N,M,D/2,2)
    return rotated.flatten(-2)  # (B,N,M,D/2,2) -> (B,N,M,D)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over all heads: q (B,N,M,D), k and v (B,L,M,D) -> (B,N,C)."""
    logits = q.shape[:3].numel() * k.shape[1]
    trains = torch.is_grad_enabled() and q.requires_grad
    if trains and q.device.type == "cpu" and q.dtype == torch.bfloat16 and logits <= PLAIN_LOGITS:
        return plain_attention(q, k, v)  # PyTorch's kernel has a backward that is no faster than in float32
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B,N,M,D) -> (B,M,N,D)
    out = F.scaled_dot_product_attention(q, k, v)  # -> (B,M,N,D)
    return out.transpose(1, 2).flatten(2)  # (B,M,N,D) -> (B,N,M,D) -> (B,N,C)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as attention, by two matrix products: it holds all B*M*N*L logits."""
    scale = q.shape[-1] ** -0.5
    logits = (scale * q.transpose(1, 2)) @ k.permute(0, 2, 3, 1)  # (B,M,N,D) x (B,M,D,L) -> (B,M,N,L)
    out = logits.softmax(dim=-1) @ v.transpose(1, 2)  # (B,M,N,L) x (B,M,L,D) -> (B,M,N,D)
    return out.transpose(1, 2).flatten(2)  # (B,M,N,D) -> (B,N,M,D) -> (B,N,C)


class OneProcess:
    """How a transformer's work is shared out over processes: not at all. parallel.Ranks shares it out over several."""

    name = "none"  # one of parallel.MODES
    writes = True  # whether this process writes the results

    def check(self, config: Any, tokens: int, offload: str) -> None:
        """Raise UserError if a model with this DiTConfig and so many tokens cannot be shared out."""

    def share(self, dit: Any) -> None:
        """Let a WanDiT work in these processes."""
        dit.ranks = self

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's share of the tokens, along a dimension: N -> N/n."""
        return x

    def join(self, x: Tensor) -> Tensor:
        """The tokens of all processes: (B,N/n,...) -> (B,N,...)."""
        return x

    def each(self, call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """call(x) for each x of the inputs."""
        return [call(x) for x in inputs]

    def agree(self, value: int) -> int:
        """The largest of all processes' values."""
        return value
