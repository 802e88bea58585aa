"""The published code's schedule of guidance, written anew for timing only (mayuelala/FastVMT at 34a050b).

The mathematics is ours, loss and windows included, so that both must give the same gradient; what differs is how:

    released                                                      ours
    two thirds of the blocks (20 of 30), whole, and the head      the blocks before the one read (14), its q and k
    each block recomputed, its self-attention again inside it     kept, or each block recomputed once
    RoPE in complex128                                            float32
    frame pairs one after the other                               in chunks
    after each update, twice gc.collect and empty_cache           never
    an update without a gradient: backward of (x * g).sum()       only the optimizer's step

The release's own flow (heads averaged, so narrower products, but keys gathered for every window) is not timed here:
amf.py measures what gathering costs.
"""

import gc
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

import window
from fastvmt import FastVMT
from skip_optim import Report
from wan_mini.dit import Attention, Block

Captured = list[tuple[Tensor, Tensor]]  # queries and keys of the block that is read, each (1,N,M,D)


class ReleaseGuidance(FastVMT):
    """Guidance on the released schedule."""

    def before_step(self, index: int, latents: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
        """FastVMT.before_step with the release's optimizer loop."""
        c = self.config
        if index >= c.guided_steps:
            return latents
        target = self.target_at(sigma, timestep)
        loss = partial(self.loss, timestep=timestep, target=target, norms={})
        latents, report = release_optimize(latents, loss, steps=c.optim_steps, interval=c.interval, lr=c.lr)
        self.losses.append(report.losses)
        return latents

    def queries_keys(self, latents: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, captured on the way through two thirds of the model and its head."""
        dit = self.dit
        x, time, modulation, text, (cos, sin) = dit.embed(latents, timestep.reshape(1), text)
        angles = torch.complex(cos.double(), sin.double())  # (N,1,D/2)
        captured: Captured = []
        depth = max(2 * len(dit.blocks) // 3, self.block + 1)
        for index, block in enumerate(dit.blocks[:depth]):
            into = captured if index == self.block else None
            x = recompute(whole_block, block, x, modulation, text, angles, into, use_reentrant=False)
        dit.unpatchify(dit.head(x, time), self.grid)
        return captured[0]

    def flow(self, q: Tensor, k: Tensor, centers: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The flow of one pair of frames after the other."""
        with patch.object(window, "CHUNK_BYTES", 1):
            return super().flow(q, k, centers)


def whole_block(
    block: Block, x: Tensor, time: Tensor, text: Tensor, angles: Tensor, captured: Captured | None
) -> Tensor:
    """Block.forward, with its self-attention recomputed once more."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + time).chunk(6, dim=1)
    h = block.norm1(x) * (1 + scale1) + shift1
    x = x + gate1 * recompute(self_attention, block.self_attn, h, angles, captured, use_reentrant=False)
    x = x + block.cross_attn(block.norm3(x), text)
    h = block.norm2(x) * (1 + scale2) + shift2
    return x + gate2 * block.ffn(h.to(block.ffn[0].weight.dtype))


def self_attention(attn: Attention, x: Tensor, angles: Tensor, captured: Captured | None) -> Tensor:
    """Attention.forward with complex RoPE; the first call puts its q and k into `captured`."""
    x = x.to(attn.q.weight.dtype)
    q, k = attn.qk(x, x)
    q = complex_rope(q, angles)
    k = complex_rope(k, angles)
    v = attn.v(x).unflatten(-1, (attn.num_heads, -1))  # (1,N,C) -> (1,N,M,D)
    if captured is not None and not captured:
        captured.append((q, k))
    return attn.o(attn.attend(q.to(v.dtype), k.to(v.dtype), v))


def complex_rope(x: Tensor, angles: Tensor) -> Tensor:
    """apply_rope as a product of complex numbers: (B,N,M,D) float32 -> (B,N,M,D) float32."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))  # (B,N,M,D) -> (B,N,M,D/2)
    return torch.view_as_real(pairs * angles).flatten(-2).float()  # (B,N,M,D/2) -> (B,N,M,D)


def flush() -> None:
    """Free memory as the release does after each update."""
    for _ in range(2):
        gc.collect()
        torch.cuda.empty_cache()  # nothing, where CUDA is not in use


def release_optimize(
    latents: Tensor, loss_fn: Callable[[Tensor], Tensor], *, steps: int, interval: int, lr: tuple[float, float]
) -> tuple[Tensor, Report]:
    """skip_optim.optimize, with a backward at each update and steps + 2 flushes."""
    flush()
    x = latents.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=lr[0], weight_decay=0.0)
    report = Report()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr[0] + (lr[1] - lr[0]) * step / max(steps - 1, 1)
        optimizer.zero_grad()
        with torch.enable_grad():
            if step % interval == 0:
                loss = loss_fn(x)
                report.losses.append(loss.item())
                loss.backward()
                assert x.grad is not None
                gradient = x.grad.clone()
            else:
                (x * gradient).sum().backward()
        optimizer.step()
        flush()
    flush()
    return x.detach(), report
