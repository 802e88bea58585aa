"""Floating-point operations and memory of the diffusion transformer, counted from its sizes (multiply-add = 2).

A forward agrees with torch's FlopCounterMode to the last operation; so does a gradient, but for what flash attention
does on top of the plain formula (tests/test_flops.py).
"""

from wan_mini.config import DiTConfig

# Bytes that autograd keeps of one block without its feed-forward, per token and channel, by bytes of a weight; counted
# by hooks on saved tensors (tests/test_flops.py).
SAVED_BYTES = {2: 36.4, 4: 48.4}


def parameters(config: DiTConfig) -> int:
    """Number of weights."""
    c, patch = config.dim, config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    block = 2 * (4 * c * c + 4 * c + 2 * c) + 2 * c + 2 * c * config.ffn_dim + config.ffn_dim + c + 6 * c
    text = config.text_dim * c + c * c + 2 * c
    time = config.freq_dim * c + c * c + 2 * c + 6 * c * c + 6 * c
    ends = config.in_dim * patch * c + c + config.out_dim * patch * (c + 1) + 2 * c
    return config.num_layers * block + text + time + ends


def block_flops(config: DiTConfig, tokens: int) -> tuple[int, int]:
    """Forward of one block: (linear layers, attention products)."""
    c, text = config.dim, config.text_len
    linear = 8 * tokens * c * c + 4 * tokens * c * c + 4 * text * c * c + 4 * tokens * c * config.ffn_dim
    return linear, 4 * tokens * tokens * c + 4 * tokens * text * c


def edge_flops(config: DiTConfig, tokens: int) -> int:
    """What every forward does before its first block: patches, text and time embedding."""
    c, patch = config.dim, config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    text = 2 * config.text_len * c * (config.text_dim + c)
    return 2 * tokens * config.in_dim * patch * c + text + 2 * c * (config.freq_dim + c + 6 * c)


def forward_flops(config: DiTConfig, tokens: int, qk_block: int | None = None) -> int:
    """One forward pass, whole or stopped at q and k of a block."""
    blocks = config.num_layers if qk_block is None else qk_block
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    end = 2 * tokens * config.dim * (config.out_dim * patch if qk_block is None else 2 * config.dim)
    return edge_flops(config, tokens) + blocks * sum(block_flops(config, tokens)) + end


def gradient_flops(config: DiTConfig, tokens: int, qk_block: int, recompute: str = "none") -> int:
    """Forward to q and k of a block and backward to the latents, weights frozen.

    A linear layer's backward costs its forward once; attention's twice, plus the logits that flash attention recomputes
    (2.5 times). The text's key and value layers depend on no latent and need none. recompute: see dit.RECOMPUTE.
    """
    linear, attention = block_flops(config, tokens)
    text = 4 * config.text_len * config.dim * config.dim
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    ends = 2 * tokens * config.dim * (config.in_dim * patch + 2 * config.dim)
    backward = qk_block * (linear - text + 5 * attention // 2) + ends
    again = qk_block * {"none": 0, "selective": linear, "block": linear + attention}[recompute]
    return forward_flops(config, tokens, qk_block) + backward + again


def activation_bytes(config: DiTConfig, tokens: int, qk_block: int, width: int, recompute: str = "none") -> int:
    """What autograd keeps between forward and backward of a gradient; width: bytes of a weight, 2 or 4.

    Where blocks are recomputed, their inputs, the kept outputs of both attentions (with a float32 sum for each token
    and head), and, during its own backward, all of one block.
    """
    block = int(tokens * (SAVED_BYTES[width] * config.dim + width * config.ffn_dim))
    if recompute == "none":
        return block * qk_block
    kept = 2 * tokens * (width * config.dim + 4 * config.num_heads) if recompute == "selective" else 0
    return block + qk_block * (4 * tokens * config.dim + kept)
