"""Sizes of a model's parts, from the tensors and configs of a checkpoint.

Shapes of tensors give nearly all of them. A config that the checkpoint carries gives the rest; without one it is as in
the official models.
"""

import re
from collections.abc import Iterable
from math import prod
from typing import Any

from wan_mini.config import WAN_MEAN, WAN_STD, DiTConfig, UMT5Config, VAEConfig
from wan_mini.errors import UserError

Shapes = dict[str, tuple[int, ...]]  # {our tensor name: shape}
Configs = list[dict[str, Any]]  # contents of config files and headers; where two disagree, the earlier one holds


def dit_config(shapes: Shapes, configs: Configs) -> DiTConfig:
    """Sizes of the DiT, from shapes; but num_heads (official heads are 128 wide) and text_len from configs.

    Raises KeyError on a missing tensor, UserError if the number of heads is unknown.
    """
    dim, in_dim, *patch = shapes["patch_embedding.weight"]  # (C, 16, pf, ph, pw)
    heads: Any = dim / 128
    layers = count_blocks(shapes, r"blocks\.(\d+)\.")
    text_len = 512
    for config in reversed(configs):  # so that the earlier one overrides the later
        diffusers_dim = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
        if dim not in (config.get("dim"), diffusers_dim):
            continue  # the config of something else
        heads = config.get("num_heads", config.get("num_attention_heads", heads))
        layers = config.get("num_layers", layers)
        text_len = config.get("text_len", text_len)
    if heads != int(heads):
        raise UserError(f"num_heads is unknown for width {dim}")
    return DiTConfig(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_heads=int(heads),
        num_layers=layers,
        freq_dim=shapes["time_embedding.0.weight"][1],
        text_dim=shapes["text_embedding.0.weight"][1],
        text_len=text_len,
        in_dim=in_dim,
        out_dim=shapes["head.head.weight"][0] // prod(patch),
        patch_size=(patch[0], patch[1], patch[2]),
    )


def vae_config(shapes: Shapes, configs: Configs) -> VAEConfig:
    """Sizes of the VAE, from shapes; but mean and std from configs. Raises KeyError on a missing tensor."""
    dim = shapes["encoder.conv1.weight"][0]
    # A level of the encoder is its residual blocks and one downsampling, which only the last level lacks.
    layers = count_blocks(shapes, r"encoder\.downsamples\.(\d+)\.")
    blocks = 0
    while blocks < layers and f"encoder.downsamples.{blocks}.resample.1.weight" not in shapes:
        blocks += 1
    firsts = range(0, layers, blocks + 1)
    widths = [shapes[f"encoder.downsamples.{first}.residual.2.weight"][0] for first in firsts]
    mean: Iterable[float] = WAN_MEAN
    std: Iterable[float] = WAN_STD
    for config in reversed(configs):  # so that the earlier one overrides the later
        vae = config.get("vae", config)
        mean = vae.get("mean", vae.get("latents_mean", mean))
        std = vae.get("std", vae.get("latents_std", std))
    return VAEConfig(
        dim=dim,
        z_dim=shapes["conv2.weight"][0],
        dim_mult=tuple(width // dim for width in widths),
        num_res_blocks=blocks,
        mean=tuple(mean),
        std=tuple(std),
    )


def umt5_config(shapes: Shapes, configs: Configs) -> UMT5Config:
    """Sizes of the text encoder, all from shapes. Raises KeyError on a missing tensor."""
    vocab, dim = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return UMT5Config(
        vocab=vocab,
        dim=dim,
        dim_attn=shapes["blocks.0.attn.q.weight"][0],
        dim_ffn=shapes["blocks.0.ffn.fc1.weight"][0],
        num_heads=heads,
        num_layers=count_blocks(shapes, r"blocks\.(\d+)\."),
        num_buckets=buckets,
    )


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """How many blocks the names number, from 0; the pattern's first group is the number."""
    count = 0
    for name in names:
        match = re.match(pattern, name)
        if match:
            count = max(count, int(match[1]) + 1)
    return count


CONFIGS = {"dit": dit_config, "vae": vae_config, "text_encoder": umt5_config}
