"""The UMT5 text encoder: token ids in, one vector per token out.

Module names are the original's (Wan 2.1, wan/modules/t5.py). Sources: T5 (arXiv 1910.10683), whose relative positions
and unscaled attention it has, and UniMax (arXiv 2304.09151), which introduced UMT5.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.config import UMT5Config
from wan_mini.errors import UserError

EPS = 1e-6


class T5Norm(nn.Module):
    """Root-mean-square norm without bias, computed in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> same shape and dtype."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), EPS).to(x.dtype)


class RelativePosition(nn.Module):
    """A learned bias per head for the distance from query to key; in UMT5 every layer has its own table."""

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int = 128):
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def bucket(self, distance: Tensor) -> Tensor:
        """Signed distances key - query, in tokens -> bucket numbers in 0..num_buckets-1, same shape.

        Half of the buckets for each direction; in each, the first half counts exactly, the rest grows logarithmically
        to max_distance and shares its last bucket beyond.
        """
        half = self.num_buckets // 2
        exact = half // 2
        length = distance.abs()
        share = torch.log(length.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)  # 1 at the largest
        logarithmic = exact + (share * (half - exact)).long()
        bucket = torch.where(length < exact, length, logarithmic.clamp(max=half - 1))
        return bucket + half * (distance > 0)

    def forward(self, length: int) -> Tensor:
        """length L in tokens -> bias (1, M, L, L), query by key."""
        position = torch.arange(length, device=self.embedding.weight.device)
        buckets = self.bucket(position[None, :] - position[:, None])  # (L, L)
        return self.embedding(buckets).permute(2, 0, 1).unsqueeze(0)  # (L,L,M) -> (1,M,L,L)


class Attention(nn.Module):
    """Bidirectional attention with a relative bias and no 1/sqrt(D): T5 folds the scale into its weights."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.k = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.v = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.o = nn.Linear(config.dim_attn, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B,L,C), bias (B or 1, M, L, L) with very negative entries at padded keys -> (B,L,C)."""
        heads = (self.num_heads, -1)
        q = self.q(x).unflatten(-1, heads).transpose(1, 2)  # (B,L,C) -> (B,L,M,D) -> (B,M,L,D)
        k = self.k(x).unflatten(-1, heads).transpose(1, 2)
        v = self.v(x).unflatten(-1, heads).transpose(1, 2)
        weights = (q @ k.mT + bias).float().softmax(-1).to(v.dtype)  # (B,M,L,L); float32: unscaled logits are large
        return self.o((weights @ v).transpose(1, 2).flatten(2))  # (B,M,L,D) -> (B,L,C)


class FeedForward(nn.Module):
    """Gated GELU (tanh form): fc2(fc1(x) * gelu(gate(x)))."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(config.dim, config.dim_ffn, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = nn.Linear(config.dim_ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,L,C) -> same shape."""
        return self.fc2(self.fc1(x) * self.gate(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.norm1 = T5Norm(config.dim)
        self.attn = Attention(config)
        self.norm2 = T5Norm(config.dim)
        self.ffn = FeedForward(config)
        self.pos_embedding = RelativePosition(config.num_buckets, config.num_heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B,L,C), mask (B,1,1,L) added to the logits -> (B,L,C)."""
        x = x + self.attn(self.norm1(x), self.pos_embedding(x.shape[1]) + mask)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nn.Module):
    """UMT5's encoder, as Wan 2.1 uses it for its prompts."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = T5Norm(config.dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B,L) token numbers, mask (B,L) 1 for a token, 0 for padding -> (B,L,C) in the dtype of the weights.

        Rows at padding are undefined: drop them. Raises UserError if an id is outside the vocabulary.
        """
        if ids.min() < 0 or ids.max() >= self.config.vocab:
            expected = f"0..{self.config.vocab - 1}"
            got = f"{ids.min()}..{ids.max()}"
            raise UserError(f"token ids must be in {expected}, got {got}: is this the checkpoint's own tokenizer?")
        x = self.token_embedding(ids)  # (B,L) -> (B,L,C)
        hidden = torch.finfo(x.dtype).min * (mask[:, None, None, :] == 0).to(x.dtype)  # (B,L) -> (B,1,1,L)
        for block in self.blocks:
            x = block(x, hidden)
        return self.norm(x)
