"""Floating-point operations of the diffusion transformer, counted from its sizes (one multiply-add = 2 operations).

A forward pass agrees with torch's FlopCounterMode to the last operation; so does a gradient, but for what flash
attention does on top of the plain formula (tests/test_flops.py). Only products of matrices count.
"""

import math

from wan_mini.config import DiTConfig


def linear_flops(rows: int, columns_in: int, columns_out: int) -> int:
    """A linear layer on (rows, columns_in) -> (rows, columns_out)."""
    return 2 * rows * columns_in * columns_out


def linear_parameters(columns_in: int, columns_out: int) -> int:
    """Weight and bias of a linear layer."""
    return columns_in * columns_out + columns_out


def attention_flops(config: DiTConfig, queries: int, keys: int) -> int:
    """All heads: logits q k^T, and the weighted sum of values."""
    logits = 2 * queries * keys * config.dim
    weighted_sum = 2 * queries * keys * config.dim
    return logits + weighted_sum


def parameters(config: DiTConfig) -> int:
    """Number of weights."""
    width = config.dim
    patch_volume = math.prod(config.patch_size)
    projections = 4 * linear_parameters(width, width)  # q, k, v, o
    qk_norms = 2 * width
    attention = projections + qk_norms
    cross_attention_norm = 2 * width  # weight and bias of norm3
    feed_forward = linear_parameters(width, config.ffn_dim) + linear_parameters(config.ffn_dim, width)
    block_modulation = 6 * width
    block = 2 * attention + cross_attention_norm + feed_forward + block_modulation

    patch_embedding = linear_parameters(config.in_dim * patch_volume, width)
    text_embedding = linear_parameters(config.text_dim, width) + linear_parameters(width, width)
    time_embedding = linear_parameters(config.freq_dim, width) + linear_parameters(width, width)
    time_projection = linear_parameters(width, 6 * width)
    head_modulation = 2 * width
    head = linear_parameters(width, config.out_dim * patch_volume) + head_modulation
    embeddings = patch_embedding + text_embedding + time_embedding + time_projection
    return embeddings + config.num_layers * block + head


def text_key_value_flops(config: DiTConfig) -> int:
    """Keys and values of the text, in one block's cross-attention."""
    return 2 * linear_flops(config.text_len, config.dim, config.dim)


def block_flops(config: DiTConfig, tokens: int) -> tuple[int, int]:
    """Forward of one block: (linear layers, attention products)."""
    width = config.dim
    self_attention = 4 * linear_flops(tokens, width, width)  # q, k, v, o
    cross_attention = 2 * linear_flops(tokens, width, width) + text_key_value_flops(config)  # q, o; k, v
    feed_forward = linear_flops(tokens, width, config.ffn_dim) + linear_flops(tokens, config.ffn_dim, width)
    linear = self_attention + cross_attention + feed_forward
    attention = attention_flops(config, tokens, tokens) + attention_flops(config, tokens, config.text_len)
    return linear, attention


def patch_embedding_flops(config: DiTConfig, tokens: int) -> int:
    """The patch of each token to its vector."""
    return linear_flops(tokens, config.in_dim * math.prod(config.patch_size), config.dim)


def edge_flops(config: DiTConfig, tokens: int) -> int:
    """What every forward does before its first block: patches, text and time embedding."""
    width = config.dim
    text = linear_flops(config.text_len, config.text_dim, width) + linear_flops(config.text_len, width, width)
    time_embedding = linear_flops(1, config.freq_dim, width) + linear_flops(1, width, width)
    time_projection = linear_flops(1, width, 6 * width)
    return patch_embedding_flops(config, tokens) + text + time_embedding + time_projection


def qk_flops(config: DiTConfig, tokens: int) -> int:
    """Queries and keys of a block's self-attention."""
    return 2 * linear_flops(tokens, config.dim, config.dim)


def head_flops(config: DiTConfig, tokens: int) -> int:
    """The vector of each token to its patch of the velocity."""
    return linear_flops(tokens, config.dim, config.out_dim * math.prod(config.patch_size))


def forward_flops(config: DiTConfig, tokens: int, qk_block: int | None = None) -> int:
    """One forward pass, whole or stopped at q and k of a block."""
    linear, attention = block_flops(config, tokens)
    if qk_block is None:
        return edge_flops(config, tokens) + config.num_layers * (linear + attention) + head_flops(config, tokens)
    return edge_flops(config, tokens) + qk_block * (linear + attention) + qk_flops(config, tokens)


def gradient_flops(config: DiTConfig, tokens: int, qk_block: int, recompute: str = "none") -> int:
    """Forward to q and k of a block and backward to the latents, weights frozen.

    A linear layer's backward costs its forward once; attention's twice, plus the logits that flash attention recomputes
    (2.5 times). The text's key and value layers depend on no latent and need none. recompute: see dit.RECOMPUTE.
    """
    linear, attention = block_flops(config, tokens)
    block_backward = linear - text_key_value_flops(config) + 5 * attention // 2
    edges_backward = patch_embedding_flops(config, tokens) + qk_flops(config, tokens)
    block_recomputed = {"none": 0, "selective": linear, "block": linear + attention}[recompute]
    forward = forward_flops(config, tokens, qk_block)
    return forward + qk_block * (block_backward + block_recomputed) + edges_backward


def training_flops(config: DiTConfig, tokens: int, recompute: str = "none") -> int:
    """Forward and backward of the whole transformer to what is trained in its first block; the weights are frozen.

    Adapters themselves are not counted: about 1 % at rank 128. recompute: see dit.RECOMPUTE.
    """
    linear, attention = block_flops(config, tokens)
    backward = linear - text_key_value_flops(config) + 5 * attention // 2
    recomputed = {"none": 0, "selective": linear, "block": linear + attention}[recompute]
    return forward_flops(config, tokens) + config.num_layers * (backward + recomputed) + head_flops(config, tokens)
