"""The Wan 2.1 diffusion transformer: noisy latents, a timestep and a text in, a velocity out.

Module names are the original's (Wan-Video/Wan2.1, wan/modules/model.py), so its checkpoints load without renaming.
Source of the architecture: Wan technical report (arXiv 2503.20314), section 4.2.

Precision. Matrix products run in the dtype of their weights. Four parts are float32 whatever that dtype is, as in the
original: the time MLP, the modulation (in bfloat16 a scale `1 + s` loses a small s), the residual stream with its gates
(thirty small updates would round away), and the head. Norms are float32 inside; see keeps_float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from wan_mini.attention import AttentionFunction, OneProcess, Rope, apply_rope, attention, rope_table
from wan_mini.config import DiTConfig
from wan_mini.errors import UserError

EPS = 1e-6
# Activation checkpointing: what a backward pass computes again instead of keeping it. Nothing; of each block all but
# the outputs of its attention, which cost the most and take the least memory; each block whole. Gradients are the same.
RECOMPUTE = ("none", "selective", "block")
ATTENTION_OPS = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def keeps_float32(parameter_name: str) -> bool:
    """Return whether a parameter of WanDiT stays float32 when the others are bfloat16.

    These are the time MLP, the head, all modulations and all norms; parameter_name is as in the state dict.
    """
    parts = parameter_name.split(".")
    if parts[0] in ("time_embedding", "time_projection", "head") or parts[-1] == "modulation":
        return True
    return any(part.startswith("norm") for part in parts)


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep, cosines first: (B,) in [0,1000] -> (B, dim) float32 on the CPU.

    float64 on the CPU because the fastest sinusoid turns by 1000 rad, and not every device has float64.
    """
    half = dim // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(timestep.cpu().double(), frequencies)  # (B,) x (dim/2,) -> (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()  # -> (B, dim)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width C (all heads together), computed in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) of any dtype -> (..., C) float32."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, EPS)


class LayerNorm(nn.LayerNorm):
    """Layer norm of the float32 residual stream; only norm3 has weights."""

    def __init__(self, dim: int, affine: bool = False):
        super().__init__(dim, eps=EPS, elementwise_affine=affine)


class Attention(nn.Module):
    """Multi-head attention with normalized queries and keys: self-attention with RoPE, cross-attention without.

    `attend` is the function that does it, by default `attention`; WanDiT.set_attention sets another.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)
        self.attend: AttentionFunction = attention

    def qk(self, x: Tensor, context: Tensor, rope: Rope | None = None) -> tuple[Tensor, Tensor]:
        """Normalized, rotated queries of x and keys of context, float32: (B,N,C), (B,L,C) -> (B,N,M,D), (B,L,M,D)."""
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, heads)  # (B,N,C) -> (B,N,M,D)
        k = self.norm_k(self.k(context)).unflatten(-1, heads)  # (B,L,C) -> (B,L,M,D)
        if rope is None:
            return q, k
        return apply_rope(q, rope), apply_rope(k, rope)

    def forward(self, x: Tensor, context: Tensor | None = None, rope: Rope | None = None) -> Tensor:
        """x (B,N,C) attends to context (B,L,C), or to itself -> (B,N,C) in the dtype of the weights."""
        x = x.to(self.q.weight.dtype)  # float32 stream -> compute dtype
        if context is None:
            context = x
        q, k = self.qk(x, context, rope)
        v = self.v(context).unflatten(-1, (self.num_heads, -1))  # (B,L,C) -> (B,L,M,D)
        return self.o(self.attend(q.to(v.dtype), k.to(v.dtype), v))


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

    def qk(self, x: Tensor, time: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Self-attention's q and k for the stream x (B,N,C), and nothing after them -> 2 x (B,N,M,D) float32."""
        modulation = self.modulation + time  # (B,6,C)
        shift, scale = modulation[:, 0:1], modulation[:, 1:2]  # (B,1,C) each
        h = (self.norm1(x) * (1 + scale) + shift).to(self.self_attn.q.weight.dtype)
        return self.self_attn.qk(h, h, rope)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, rope: Rope) -> Tensor:
        """x (B,N,C) float32, time (B,6,C) float32, text (B,L,C) -> (B,N,C) float32."""
        # Both are float32: the modulation, because bfloat16 would round 1 + scale to 3 digits, and the gated sums,
        # because it would lose each update smaller than 1/256 of the stream.
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6, dim=1)  # 6 x (B,1,C)
        x = x + gate1 * self.self_attn(self.norm1(x) * (1 + scale1) + shift1, rope=rope)
        x = x + self.cross_attn(self.norm3(x), text)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.ffn(h.to(self.ffn[0].weight.dtype))


class Head(nn.Module):
    """Last norm, modulation and projection of every token to its patch of the velocity.

    It stays float32, because its output is summed over all steps of a sampler.
    """

    def __init__(self, dim: int, patch_dim: int):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, patch_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B,N,C) float32, time (B,C) float32 -> (B,N,patch_dim) float32."""
        shift, scale = (self.modulation + time.unsqueeze(1)).chunk(2, dim=1)  # (B,2,C) -> 2 x (B,1,C)
        return self.head(self.norm(x) * (1 + scale) + shift)


class Embedded(NamedTuple):
    """What the blocks take: the token stream and all that steers it."""

    tokens: Tensor  # (B,N,C) float32
    time: Tensor  # (B,C) float32, for the head
    modulation: Tensor  # (B,6,C) float32, for the blocks
    text: Tensor  # (B,text_len,C)
    rope: Rope


class WanDiT(nn.Module):
    """Wan 2.1's text-to-video transformer; predicts the rectified-flow velocity noise - clean."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        patch = config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(dim, config.out_dim * patch[0] * patch[1] * patch[2])
        self.ranks = OneProcess()

    def set_attention(self, function: AttentionFunction) -> None:
        """Let every attention of the model run `function`: q (B,N,M,D), k and v (B,L,M,D) -> (B,N,C)."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = function

    def grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Token grid (F,H,W) of latents (B,16,F,2H,2W). Raises UserError if they do not patchify."""
        patch = self.config.patch_size
        fits = latents.ndim == 5 and latents.shape[1] == self.config.in_dim
        if not fits or any(size % p for size, p in zip(latents.shape[2:], patch, strict=True)):
            expected = f"(B, {self.config.in_dim}, F, H, W) with F, H, W divisible by {patch}"
            raise UserError(f"latents must be {expected}, got {tuple(latents.shape)}")
        frames, height, width = latents.shape[2:]
        return frames // patch[0], height // patch[1], width // patch[2]

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        *,
        qk_block: int | None = None,
        recompute: str = "none",
        times: Sequence[float] | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity of noisy latents, or the queries and keys of one block.

        latents (B,16,F,2H,2W); timestep (B,) in [0,1000], best left on the CPU; text (B,L<=text_len,text_dim), here
        zero-padded to text_len and not masked, as in training; recompute: what a backward does again, see RECOMPUTE;
        times: temporal RoPE positions of the F latent frames, real numbers, None for 0..F-1;
        tokens: numbers (N',), in raster order, of those that the blocks see, at their positions; only with qk_block.
        -> velocity, float32, shaped like latents; or with qk_block=i (q, k) of block i's self-attention after norm
        and RoPE, each (B,N,M,D) float32: blocks 0..i-1 run whole, block i stops at q and k, nothing after it runs.
        Raises UserError on latents that do not patchify, too long a text, a block or a policy that does not exist, or
        times of another number than F.
        """
        grid = self.grid(latents)
        if qk_block is not None and not 0 <= qk_block < len(self.blocks):
            raise UserError(f"qk_block must be in 0..{len(self.blocks) - 1}, got {qk_block}")
        if recompute not in RECOMPUTE:
            raise UserError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute}")
        x, time, modulation, text, (cos, sin) = self.embed(latents, timestep, text, times)
        if tokens is not None:
            tokens = tokens.to(x.device)
            x, cos, sin = x[:, tokens], cos[tokens], sin[tokens]  # (B,N,C) -> (B,N',C), (N,1,D/2) -> (N',1,D/2)
        rope = self.ranks.split(cos, dim=0), self.ranks.split(sin, dim=0)  # (N,1,D/2) -> (N/n,1,D/2), n processes
        x = self.ranks.split(x)  # (B,N,C) -> (B,N/n,C)
        for block in self.blocks[:qk_block]:  # all of them, if qk_block is None
            x = _run_block(block, recompute, x, modulation, text, rope)
        if qk_block is not None:
            q, k = cast(Block, self.blocks[qk_block]).qk(x, modulation, rope)  # 2 x (B,N/n,M,D)
            return self.ranks.join(q), self.ranks.join(k)
        return self.unpatchify(self.ranks.join(self.head(x, time)), grid)

    def embed(self, latents: Tensor, timestep: Tensor, text: Tensor, times: Sequence[float] | None = None) -> Embedded:
        """Everything before the first block; arguments and errors as in forward."""
        grid = self.grid(latents)
        if times is not None and len(times) != grid[0]:
            raise UserError(f"times must hold a position for each of the {grid[0]} latent frames, got {len(times)}")
        patches = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))  # (B,16,F,2H,2W) -> (B,C,F,H,W)
        tokens = patches.flatten(2).mT.float()  # (B,C,F,H,W) -> (B,C,N) -> (B,N,C), raster order
        tokens = tokens.contiguous()  # in a view, norms are slow
        # The timestep is float32: bfloat16 would round 954 to 952, the published FastVMT's mistake. The time MLP is
        # float32 because the original's is; bfloat16 would do as well.
        sinusoids = timestep_embedding(timestep, self.config.freq_dim).to(latents.device)
        time = self.time_embedding(sinusoids)  # (B,freq_dim) -> (B,C)
        modulation = self.time_projection(time).unflatten(1, (6, -1))  # (B,6C) -> (B,6,C)
        rope = rope_table(grid, self.config.dim // self.config.num_heads, latents.device, times)
        return Embedded(tokens, time, modulation, self.embed_text(text), rope)

    def embed_text(self, text: Tensor) -> Tensor:
        """Text (B,L,text_dim) -> (B,text_len,C); padded before the MLP, so that pads become its output for zero.

        Raises UserError on a text that is too long or too wide.
        """
        missing = self.config.text_len - text.shape[1]
        if missing < 0 or text.shape[-1] != self.config.text_dim:
            expected = f"(B, L <= {self.config.text_len}, {self.config.text_dim})"
            raise UserError(f"text must be {expected}, got {tuple(text.shape)}")
        text = F.pad(text, (0, 0, 0, missing))  # (B,L,text_dim) -> (B,text_len,text_dim)
        dtype = next(self.text_embedding.parameters()).dtype
        return self.text_embedding(text.to(dtype))  # (B,text_len,text_dim) -> (B,text_len,C)

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """x (B,N,patch_dim) -> (B,16,F,2H,2W); inside a patch the channel runs fastest."""
        x = x.unflatten(2, (*self.config.patch_size, -1)).unflatten(1, grid)  # -> (B, F,H,W, pf,ph,pw, 16)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # -> (B, 16, F,pf, H,ph, W,pw)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # -> (B, 16, F*pf, H*ph, W*pw)


def _run_block(block: nn.Module, recompute: str, x: Tensor, modulation: Tensor, text: Tensor, rope: Rope) -> Tensor:
    """Run a block; of its activations keep for a backward pass only what `recompute` leaves."""
    if recompute == "none":
        return block(x, modulation, text, rope)
    run = partial(checkpoint, block, x, modulation, text, rope, use_reentrant=False, preserve_rng_state=False)
    if recompute == "block":
        return run()
    return run(context_fn=partial(create_selective_checkpoint_contexts, list(ATTENTION_OPS)))
