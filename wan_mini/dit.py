"""The Wan 2.1 diffusion transformer: noisy latents, a timestep and a text in, a velocity out.

Module names are the original's (Wan-Video/Wan2.1, wan/modules/model.py), so its checkpoints load without renaming.

Precision. Matrix products run in the dtype of their weights. Four islands are float32 whatever that dtype is, as in the
original: the time MLP (bfloat16 holds 8 bits, timesteps go to 1000), the modulation (a scale `1 + s` loses a small s),
the residual stream with its gates (thirty small updates would round away), and the head. Norms are float32 inside.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from wan_mini.config import DiTConfig

EPS = 1e-6
FP32_PARTS = ("time_embedding", "time_projection", "modulation", "norm", "head.")  # parameters that stay float32
# What a backward computes again instead of keeping it: nothing; of each block all but the outputs of its attention,
# which cost the most and take the least memory; or each block whole. Gradients are the same.
RECOMPUTE = ("none", "selective", "block")
KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
ATTENTION = [getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default for kernel in KERNELS]


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep, cosines first: (B,) in [0,1000] -> (B, dim) float32 on the CPU.

    float64 on the CPU because the fastest sinusoid turns by 1000 rad, and not every device has float64.
    """
    half = dim // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(timestep.cpu().double(), frequencies)  # (B,) x (dim/2,) -> (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()  # -> (B, dim)


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's 3D rotary angles, each (N, 1, D/2) float32.

    The D/2 channel pairs are split unevenly: a third (rounded down) each for rows and columns, the rest for time.
    """
    third = head_dim // 6
    pairs = (head_dim // 2 - 2 * third, third, third)
    tables = []
    for wave in (torch.cos, torch.sin):
        axes = []
        for axis, (size, n) in enumerate(zip(grid, pairs)):
            frequencies = 10000.0 ** -(torch.arange(n, dtype=torch.float64) / n)
            values = wave(torch.outer(torch.arange(size, dtype=torch.float64), frequencies)).float().to(device)
            shape = [1, 1, 1, n]
            shape[axis] = size
            axes.append(values.reshape(shape).expand(*grid, n))  # (size, n) -> (F,H,W, n)
        tables.append(torch.cat(axes, dim=-1).flatten(0, 2).unsqueeze(1))  # (F,H,W, D/2) -> (N, 1, D/2)
    return tables[0], tables[1]


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each neighboring channel pair of x (B,N,M,D) by its token's angles."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B,N,M,D) -> 2 x (B,N,M,D/2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)  # -> (B,N,M,D)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over all heads: (B,N,M,D), (B,L,M,D), (B,L,M,D) -> (B,N,C)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,N,M,D) -> (B,M,N,D)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # -> (B,N,M,D) -> (B,N,C)


def _run_block(block: nn.Module, recompute: str, *inputs: Tensor) -> Tensor:
    """block(*inputs), of whose activations only what `recompute` leaves is kept for a backward."""
    if recompute == "none":
        return block(*inputs)
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, ATTENTION)} if recompute == "selective" else {}
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **kept)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width C (all heads together), in and out of float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, EPS)


class LayerNorm(nn.LayerNorm):
    """Layer norm of the float32 residual stream; only norm3 has weights."""

    def __init__(self, dim: int, affine: bool = False):
        super().__init__(dim, eps=EPS, elementwise_affine=affine)


class Attention(nn.Module):
    """Multi-head attention with normalized queries and keys: self-attention with RoPE, cross-attention without."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)

    def qk(self, x: Tensor, context: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Normalized, rotated queries of x and keys of context, float32: (B,N,C), (B,L,C) -> (B,N,M,D), (B,L,M,D)."""
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, heads)  # (B,N,C) -> (B,N,M,D)
        k = self.norm_k(self.k(context)).unflatten(-1, heads)  # (B,L,C) -> (B,L,M,D)
        return (q, k) if rope is None else (apply_rope(q, rope), apply_rope(k, rope))

    def forward(self, x: Tensor, context: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B,N,C) attends to context (B,L,C), or to itself -> (B,N,C)."""
        x = x.to(self.q.weight.dtype)  # float32 stream -> compute dtype
        context = x if context is None else context
        q, k = self.qk(x, context, rope)
        v = self.v(context).unflatten(-1, (self.num_heads, -1))  # (B,L,C) -> (B,L,M,D)
        return self.o(attention(q.to(v.dtype), k.to(v.dtype), v))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the timestep scales, shifts and gates the first and the last."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim = config.dim
        self.norm1 = LayerNorm(dim)
        self.self_attn = Attention(dim, config.num_heads)
        self.norm3 = LayerNorm(dim, affine=True)  # the original's order of names: norm3 comes before norm2
        self.cross_attn = Attention(dim, config.num_heads)
        self.norm2 = LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def qk(self, x: Tensor, time: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Self-attention's q and k for the stream x (B,N,C) and nothing behind them -> 2 x (B,N,M,D) float32."""
        shift, scale = (self.modulation + time).chunk(6, dim=1)[:2]  # (B,6,C) -> 2 x (B,1,C)
        h = (self.norm1(x) * (1 + scale) + shift).to(self.self_attn.q.weight.dtype)
        return self.self_attn.qk(h, h, rope)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x (B,N,C) float32, time (B,6,C) float32, text (B,L,C) -> (B,N,C) float32."""
        # float32 islands: the modulation, where bfloat16 would round 1 + scale to 3 digits, and the gated sums, where
        # it would lose each update smaller than 1/256 of the stream.
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6, dim=1)  # 6 x (B,1,C)
        x = x + gate1 * self.self_attn(self.norm1(x) * (1 + scale1) + shift1, rope=rope)
        x = x + self.cross_attn(self.norm3(x), text)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.ffn(h.to(self.ffn[0].weight.dtype))


class Head(nn.Module):
    """Last norm, modulation and projection of every token to its patch of the velocity.

    A float32 island: its output is summed over all steps of a sampler.
    """

    def __init__(self, dim: int, patch_dim: int):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, patch_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B,N,C), time (B,C) -> (B,N,patch_dim)."""
        shift, scale = (self.modulation + time.unsqueeze(1)).chunk(2, dim=1)  # (B,2,C) -> 2 x (B,1,C)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanDiT(nn.Module):
    """Wan 2.1's text-to-video transformer; predicts the rectified-flow velocity noise - clean."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(dim, config.out_dim * patch[0] * patch[1] * patch[2])

    def grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Token grid (F,H,W) of latents (B,16,F,2H,2W). Raises ValueError if they do not patchify."""
        channels, patch = self.config.in_dim, self.config.patch_size
        fits = latents.ndim == 5 and latents.shape[1] == channels
        if not fits or any(n % p for n, p in zip(latents.shape[2:], patch)):
            wanted = f"(B, {channels}, F, H, W) with F, H, W divisible by {patch}"
            raise ValueError(f"latents must be {wanted}, got {tuple(latents.shape)}")
        return tuple(n // p for n, p in zip(latents.shape[2:], patch))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        *,
        qk_block: int | None = None,
        velocity: bool = False,
        recompute: str = "none",
    ) -> Tensor | tuple[Tensor, ...]:
        """Velocity of noisy latents, or the queries and keys of one block, or all three.

        latents (B,16,F,2H,2W); timestep (B,) in [0,1000], best left on the CPU; text (B,L<=text_len,text_dim), here
        zero-padded to text_len and not masked, as in training; recompute: what a backward does again, see RECOMPUTE.
        -> velocity, float32, shaped like latents; or with qk_block=i (q, k) of block i's self-attention after norm
        and RoPE, each (B,N,M,D) float32: blocks 0..i-1 run whole, block i stops at q and k, nothing behind it runs;
        or with velocity=True too, (velocity, q, k) of one pass, for a loss on both.
        Raises ValueError on latents that do not patchify, too long a text, a block or a policy that does not exist.
        """
        grid = self.grid(latents)
        if qk_block is not None and not 0 <= qk_block < len(self.blocks):
            raise ValueError(f"qk_block must be in 0..{len(self.blocks) - 1}, got {qk_block}")
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute}")
        x = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))  # (B,16,F,2H,2W) -> (B,C,F,H,W)
        x = x.flatten(2).mT.float().contiguous()  # (B,C,F,H,W) -> (B,N,C), raster order; in a view, norms are slow
        rope = rope_table(grid, self.config.dim // self.config.num_heads, x.device)
        # float32 island: the time MLP; bfloat16 would merge timesteps that differ by less than 4.
        time = self.time_embedding(timestep_embedding(timestep, self.config.freq_dim).to(x.device))  # (B,) -> (B,C)
        modulation = self.time_projection(time).unflatten(1, (6, -1))  # (B,6C) -> (B,6,C)
        text = self.embed_text(text)
        for block in self.blocks[:qk_block]:
            x = _run_block(block, recompute, x, modulation, text, rope)
        qk = () if qk_block is None else self.blocks[qk_block].qk(x, modulation, rope)
        if qk and not velocity:
            return qk
        for block in self.blocks[qk_block:] if qk else ():
            x = _run_block(block, recompute, x, modulation, text, rope)
        out = self.unpatchify(self.head(x, time), grid)
        return (out, *qk) if qk else out

    def embed_text(self, text: Tensor) -> Tensor:
        """(B,L,text_dim) -> (B,text_len,C); padding before the MLP, so that pads become its output for zero."""
        missing = self.config.text_len - text.shape[1]
        if missing < 0 or text.shape[-1] != self.config.text_dim:
            wanted = f"(B, L <= {self.config.text_len}, {self.config.text_dim})"
            raise ValueError(f"text must be {wanted}, got {tuple(text.shape)}")
        text = F.pad(text, (0, 0, 0, missing))  # (B,L,text_dim) -> (B,text_len,text_dim)
        return self.text_embedding(text.to(self.text_embedding[0].weight.dtype))

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B,N,patch_dim) -> (B,16,F,2H,2W); inside a patch the channel runs fastest."""
        x = x.unflatten(2, (*self.config.patch_size, -1)).unflatten(1, grid)  # -> (B, F,H,W, pf,ph,pw, 16)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # -> (B, 16, F,pf, H,ph, W,pw)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # -> (B, 16, F*pf, H*ph, W*pw)
