"""One run over several processes, a GPU each: the two passes of classifier-free guidance, and the tokens of a clip.

    torchrun --nproc-per-node 2 fastvmt.py ... --parallel cfg            # each process makes one of a step's two passes
    torchrun --nproc-per-node 4 fastvmt.py ... --parallel sequence       # each has a quarter of the tokens
    torchrun --nproc-per-node 8 fastvmt.py ... --parallel cfg,sequence   # both: two groups of four
    torchrun --nproc-per-node 2 fastvmt.py ... --parallel cfg,weights    # each has half of the transformer's weights

Tokens meet in self-attention only. There the processes change from a share of the tokens to a share of the heads, and
back behind it (all-to-all; DeepSpeed-Ulysses, arXiv 2309.14509), forward and backward, so a gradient is shared out too.
Queries and keys of the block that is read are gathered, and every process computes the whole loss of them. Every
process ends each step with the same latents, and the first one writes. Each holds all weights, unless they are shared
out as well (shard.py).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from wan_mini.attention import OneProcess, attention
from wan_mini.device.shard import held_bytes, shard_weights
from wan_mini.errors import UserError

MODES = ("cfg", "sequence", "cfg,sequence", "cfg,weights", "sequence,weights", "cfg,sequence,weights")
CPU = torch.device("cpu")


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What each process of a group has, in their order: (...) -> (n,...)."""
    parts = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(parts), x.contiguous(), group)
    return parts


def exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send x[i] to process i, and get what each has sent here, with a gradient: (n,...) -> (n,...)."""
    return all_to_all_single_autograd(x.contiguous(), None, None, group)


class _Split(torch.autograd.Function):
    """A process's share of the tokens, along a dimension. Its gradient is joined from all processes' shares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim = dim
        ctx.group = group
        return x.chunk(group.size(), dim)[group.rank()].contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        parts = gather(gradient, ctx.group).movedim(0, ctx.dim)  # (n,B,N/n,C) -> (B,n,N/n,C)
        return parts.flatten(ctx.dim, ctx.dim + 1), None, None  # -> (B,N,C)


class _Join(torch.autograd.Function):
    """All tokens from the processes' shares. All compute the same of them, so each keeps its share of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(x, group).movedim(0, 1).flatten(1, 2)  # (n,B,N/n,...) -> (B,n,N/n,...) -> (B,N,...)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.group.size(), 1)[ctx.group.rank()].contiguous(), None


class Ranks(OneProcess):
    """The processes of a run, as one of them sees them."""

    def __init__(self, mode: str, device: torch.device = CPU):
        """Mode is one of MODES; device: this process's. Raises UserError if there are not as many as the mode takes."""
        self.name, self.device = mode, device
        mode = mode.removesuffix(",weights")
        self.shards_weights = mode != self.name
        self.size = dist.get_world_size()
        self.writes = dist.get_rank() == 0
        self.shares_passes = mode != "sequence"
        counts = {"cfg": [2], "sequence": range(2, 1025), "cfg,sequence": range(4, 1025, 2)}[mode]
        if self.size not in counts:
            known = ", ".join(map(str, counts[:2]))
            raise UserError(f"--parallel {self.name} takes {known} ... processes of torchrun, got {self.size}")
        whole = dist.group.WORLD
        assert whole is not None
        # Which processes share the tokens of a pass: outside of classifier-free guidance all, inside it half of them.
        self.whole: dist.ProcessGroup | None = None if mode == "cfg" else whole
        self.half: dist.ProcessGroup | None = self.whole
        self.pair = whole
        if mode == "cfg,sequence":
            self._make_groups(self.size // 2)
        self.tokens = self.whole  # the group of the pass at work

    def _make_groups(self, half: int) -> None:
        """Two groups of `half` neighbors, one for each pass, and pairs of those that have the same tokens in both."""
        rank = dist.get_rank()
        for first in (0, half):
            group = dist.new_group(list(range(first, first + half)))
            if first <= rank < first + half:
                self.half = group
        for low in range(half):
            group = dist.new_group([low, low + half])
            if rank % half == low:
                self.pair = group

    def check(self, config: Any, tokens: int, offload: str) -> None:
        """Raises UserError if a model with this config and a clip of so many tokens cannot be split evenly."""
        if offload == "blocks" and self.name != "cfg":
            raise UserError(f"--parallel {self.name} needs blocks that stay on the device, got --offload blocks")
        if self.half is None or self.whole is None:
            return
        n = self.half.size()
        if config.num_heads % n or tokens % n:
            got = f"{config.num_heads} heads and {tokens} tokens"
            raise UserError(f"--parallel {self.name} splits heads and tokens {n} ways evenly, got {got}")
        if config.num_heads % self.whole.size() or tokens % self.whole.size():
            self.whole = self.half  # 8 processes and 12 heads: both groups compute the same gradient
        self.tokens = self.whole

    def share(self, dit: Any) -> None:
        """Let a WanDiT work in these processes."""
        dit.ranks = self
        for block in dit.blocks:
            block.self_attn.attend = self.attend
        if self.shards_weights:
            whole = held_bytes(dit)
            shard_weights(dit, self.device, self.size)
            print(f"weights of the transformer: {held_bytes(dit) / 1e9:.3g} of {whole / 1e9:.3g} GB in this process")

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's tokens. Raises UserError if there are more of them for some processes than for others."""
        if self.tokens is None:
            return x
        if x.shape[dim] % self.tokens.size():
            raise UserError(f"--parallel splits tokens {self.tokens.size()} ways evenly, got {x.shape[dim]}")
        return _Split.apply(x, dim, self.tokens)

    def join(self, x: Tensor) -> Tensor:
        """The tokens of all: (B,N/n,...) -> (B,N,...)."""
        return x if self.tokens is None else _Join.apply(x, self.tokens)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention over the tokens of all processes: q, k, v (B,N/n,M,D) of this one's -> (B,N/n,C)."""
        group = self.tokens
        if group is None:
            return attention(q, k, v)
        n = group.size()
        x = torch.stack([q, k, v]).unflatten(3, (n, -1))  # 3 x (B,N/n,M,D) -> (3,B,N/n,n,M/n,D)
        x = exchange(x.permute(3, 0, 1, 2, 4, 5), group)  # -> (n,3,B,N/n,M/n,D), first by heads and then by tokens
        q, k, v = x.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)  # -> (3,B,n,N/n,M/n,D) -> (3,B,N,M/n,D)
        out = attention(q, k, v).unflatten(1, (n, -1))  # (B,N,C/n) -> (B,n,N/n,C/n)
        out = exchange(out.transpose(0, 1), group)  # -> (n,B,N/n,C/n), first by tokens and then by heads
        return out.permute(1, 2, 0, 3).flatten(2)  # -> (B,N/n,n,C/n) -> (B,N/n,C)

    def each(self, call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """call(x) for both inputs, one in each half of the processes."""
        if not self.shares_passes:
            return super().each(call, inputs)
        self.tokens = self.half
        mine = call(inputs[2 * dist.get_rank() // self.size])
        self.tokens = self.whole
        return list(gather(mine, self.pair))  # (2,...) -> 2 x (...)

    def agree(self, value: int) -> int:
        """The largest of what all processes give: what one of them recomputes, all must, or they would wait forever."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return max(values)


@contextmanager
def open_ranks(mode: str | None, device: torch.device) -> Iterator[OneProcess]:
    """The processes that torchrun has started, for a mode of MODES; None: this process alone.

    All but the first print nothing, and end with exit code 2 where the first one says what is wrong.
    Raises UserError if torchrun did not start this process, or not as many as the mode takes.
    """
    if mode is None:
        yield OneProcess()
        return
    if "RANK" not in os.environ:
        raise UserError(f"--parallel {mode} needs torchrun --nproc-per-node N fastvmt.py ..., got one process")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if dist.get_rank() == 0:
            yield Ranks(mode, device)
            return
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield Ranks(mode, device)
    except (UserError, FloatingPointError):
        if dist.get_rank() == 0:
            raise
        raise SystemExit(2) from None
    finally:
        dist.destroy_process_group()
