"""The UMT5 text encoder: token ids in, one vector per token out. The original's module names (wan/modules/t5.py)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.config import UMT5Config


class T5Norm(nn.Module):
    """Root-mean-square norm without bias, computed in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6).to(x.dtype)


class RelativePosition(nn.Module):
    """A learned bias per head for the distance from query to key; in UMT5 every layer has its own table."""

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int = 128):
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def bucket(self, distance: Tensor) -> Tensor:
        """Signed distances key - query -> bucket numbers, same shape.

        Half of the buckets for each direction; in each, the first half counts exactly, the rest grows logarithmically
        to max_distance and shares its last bucket beyond.
        """
        half = self.num_buckets // 2
        exact = half // 2
        far = distance.abs().clamp(min=1).float()
        log = exact + (torch.log(far / exact) / math.log(self.max_distance / exact) * (half - exact)).long()
        near = torch.where(distance.abs() < exact, distance.abs(), log.clamp(max=half - 1))
        return near + half * (distance > 0)

    def forward(self, length: int) -> Tensor:
        """-> bias (1, M, L, L), query by key."""
        place = torch.arange(length, device=self.embedding.weight.device)
        buckets = self.bucket(place[None, :] - place[:, None])  # (L, L)
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
        q, k, v = (f(x).unflatten(-1, heads).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B,L,C) -> (B,M,L,D)
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
        """ids (B,L) token numbers, mask (B,L) 1 for a token, 0 for padding -> (B,L,C); rows at padding mean nothing.

        Raises ValueError if an id is outside the vocabulary.
        """
        if ids.min() < 0 or ids.max() >= self.config.vocab:
            got, wanted = f"{ids.min()}..{ids.max()}", f"0..{self.config.vocab - 1}"
            raise ValueError(f"token ids must be in {wanted}, got {got}: is this the checkpoint's own tokenizer?")
        x = self.token_embedding(ids)  # (B,L) -> (B,L,C)
        hidden = torch.finfo(x.dtype).min * (mask[:, None, None, :] == 0).to(x.dtype)  # (B,L) -> (B,1,1,L)
        for block in self.blocks:
            x = block(x, hidden)
        return self.norm(x)
