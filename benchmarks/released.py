"""The published code's schedule of guidance, written anew for timing only (mayuelala/FastVMT at 34a050b).

The mathematics is ours, loss and windows included, so that both must give the same gradient; what differs is how:

    released                                                      ours
    two thirds of the blocks (20 of 30), whole, and the head      the blocks before the one read (14), its q and k
    each block recomputed, its self-attention again inside it     kept, or each block recomputed once
    RoPE in complex128                                            real, float32
    frame pairs one after the other                               in chunks
    after each update, twice gc.collect and empty_cache           never
    an update without a gradient: backward of (x * g).sum()       only the optimizer's step

The release's own flow (heads averaged, so narrower products, but keys gathered for every window) is not timed here:
amf.py measures what gathering costs.
"""

import gc
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

import window
from fastvmt import Guide
from skip_optim import Report
from wan_mini.attention import attention, rope_table
from wan_mini.dit import Attention, Block, timestep_embedding


class ReleasedGuide(Guide):
    """Guide, on the released schedule."""

    def qk(self, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, picked up on the way through two thirds of the model and its head."""
        dit = self.dit
        stream = dit.patch_embedding(x.to(dit.patch_embedding.weight.dtype)).flatten(2).mT.float()  # -> (1,N,C)
        cos, sin = rope_table(self.grid, dit.config.dim // dit.config.num_heads, x.device)
        angles = torch.complex(cos.double(), sin.double())  # (N,1,D/2)
        time = dit.time_embedding(timestep_embedding(timestep.reshape(1), dit.config.freq_dim).to(x.device))
        modulation = dit.time_projection(time).unflatten(1, (6, -1))
        text = dit.embed_text(text)
        found: list[tuple[Tensor, Tensor]] = []
        for index, block in enumerate(dit.blocks[: max(2 * len(dit.blocks) // 3, self.block + 1)]):
            into = found if index == self.block else None
            stream = recompute(whole_block, block, stream, modulation, text, angles, into, use_reentrant=False)
        dit.unpatchify(dit.head(stream, time), self.grid)
        return found[0]

    def flow(self, q: Tensor, k: Tensor, centers: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The flow of one pair of frames after the other."""
        with patch.object(window, "CHUNK_BYTES", 1):
            return super().flow(q, k, centers)


def whole_block(
    block: Block, x: Tensor, time: Tensor, text: Tensor, angles: Tensor, found: list[tuple[Tensor, Tensor]] | None
) -> Tensor:
    """Block.forward, with its self-attention recomputed once more."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + time).chunk(6, dim=1)
    h = block.norm1(x) * (1 + scale1) + shift1
    x = x + gate1 * recompute(self_attention, block.self_attn, h, angles, found, use_reentrant=False)
    x = x + block.cross_attn(block.norm3(x), text)
    h = block.norm2(x) * (1 + scale2) + shift2
    return x + gate2 * block.ffn(h.to(block.ffn[0].weight.dtype))


def self_attention(attn: Attention, x: Tensor, angles: Tensor, found: list[tuple[Tensor, Tensor]] | None) -> Tensor:
    """Attention.forward with complex RoPE; the first call puts its q and k into `found`."""
    x = x.to(attn.q.weight.dtype)
    q, k = attn.qk(x, x)
    q, k = complex_rope(q, angles), complex_rope(k, angles)
    v = attn.v(x).unflatten(-1, (attn.num_heads, -1))
    if found is not None and not found:
        found.append((q, k))
    return attn.o(attention(q.to(v.dtype), k.to(v.dtype), v))


def complex_rope(x: Tensor, angles: Tensor) -> Tensor:
    """apply_rope as a product of complex numbers: (B,N,M,D) float32 -> (B,N,M,D) float32."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))  # -> (B,N,M,D/2)
    return torch.view_as_real(pairs * angles).flatten(-2).float()


def flush() -> None:
    """What the release does after each update."""
    for _ in range(2):
        gc.collect()
        torch.cuda.empty_cache()  # nothing, where CUDA is not in use


def released_optimize(
    latents: Tensor, loss_fn: Callable[[Tensor], Tensor], *, steps: int, interval: int, lr: tuple[float, float]
) -> tuple[Tensor, Report]:
    """skip_optim.optimize, with a backward at each update and steps + 2 flushes."""
    flush()
    x = latents.detach().clone().requires_grad_()
    optimizer, report = torch.optim.AdamW([x], lr=lr[0], weight_decay=0.0), Report()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr[0] + (lr[1] - lr[0]) * step / max(steps - 1, 1)
        optimizer.zero_grad()
        with torch.enable_grad():
            if step % interval == 0:
                loss = loss_fn(x)
                report.losses.append(loss.item())
                loss.backward()
                gradient = x.grad.clone()
            else:
                (x * gradient).sum().backward()
        optimizer.step()
        flush()
    flush()
    return x.detach(), report
