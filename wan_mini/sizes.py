"""Sizes of a model's parts, from the tensors and configs of a checkpoint.

Shapes of tensors give nearly all of them. A config that the checkpoint carries gives the rest; without one it is as in
the official models.
"""

import re
from collections.abc import Iterable
from math import prod
from typing import Any

from wan_mini.config import PATCH, WAN_MEAN, WAN_STD, DiTConfig, UMT5Config, VAEConfig
from wan_mini.errors import UserError

MAX_BLOCKS = 128  # 14B has 40
MAX_WIDTH = 2**20  # of any side of a weight; UMT5's vocabulary has 256,384
Shapes = dict[str, tuple[int, ...]]  # {our tensor name: shape}
Configs = list[dict[str, Any]]  # contents of config files and headers; where two disagree, the earlier one holds


def dit_config(shapes: Shapes, configs: Configs) -> DiTConfig:
    """Sizes of the DiT, from shapes; but num_heads (official heads are 128 wide) and text_len from configs.

    Raises KeyError on a missing tensor, UserError if the number of heads is unknown.
    """
    dim, in_dim, *patch = _sides(shapes, "patch_embedding.weight", 5)  # (C, 16, pf, ph, pw)
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
    if layers > MAX_BLOCKS:
        raise UserError(f"num_layers must be at most {MAX_BLOCKS}, got {layers}")
    return DiTConfig(
        dim=dim,
        ffn_dim=_sides(shapes, "blocks.0.ffn.0.weight", 2)[0],
        num_heads=int(heads),
        num_layers=layers,
        freq_dim=_sides(shapes, "time_embedding.0.weight", 2)[1],
        text_dim=_sides(shapes, "text_embedding.0.weight", 2)[1],
        text_len=text_len,
        in_dim=in_dim,
        out_dim=_sides(shapes, "head.head.weight", 2)[0] // prod(patch),
        patch_size=(patch[0], patch[1], patch[2]),
    )


def vae_config(shapes: Shapes, configs: Configs) -> VAEConfig:
    """Sizes of the VAE, from shapes; but mean and std from configs. Raises KeyError on a missing tensor."""
    dim = _sides(shapes, "encoder.conv1.weight", 5)[0]
    # A level of the encoder is its residual blocks and one downsampling, which only the last level lacks.
    layers = count_blocks(shapes, r"encoder\.downsamples\.(\d+)\.")
    blocks = 0
    while blocks < layers and f"encoder.downsamples.{blocks}.resample.1.weight" not in shapes:
        blocks += 1
    firsts = range(0, layers, blocks + 1)
    widths = [_sides(shapes, f"encoder.downsamples.{first}.residual.2.weight", 5)[0] for first in firsts]
    mean: Iterable[float] = WAN_MEAN
    std: Iterable[float] = WAN_STD
    z_dim = _sides(shapes, "conv2.weight", 5)[0]
    for config in reversed(configs):  # so that the earlier one overrides the later
        vae = config.get("vae", config)
        if vae is config and config.get("z_dim") != z_dim:
            continue  # the config of something else: an image model has a mean and std as well
        mean = vae.get("mean", vae.get("latents_mean", mean))
        std = vae.get("std", vae.get("latents_std", std))
    return VAEConfig(
        dim=dim,
        z_dim=z_dim,
        dim_mult=tuple(width // dim for width in widths),
        num_res_blocks=blocks,
        mean=tuple(mean),
        std=tuple(std),
    )


def umt5_config(shapes: Shapes, configs: Configs) -> UMT5Config:
    """Sizes of the text encoder, all from shapes. Raises KeyError on a missing tensor."""
    vocab, dim = _sides(shapes, "token_embedding.weight", 2)
    buckets, heads = _sides(shapes, "blocks.0.pos_embedding.embedding.weight", 2)
    return UMT5Config(
        vocab=vocab,
        dim=dim,
        dim_attn=_sides(shapes, "blocks.0.attn.q.weight", 2)[0],
        dim_ffn=_sides(shapes, "blocks.0.ffn.fc1.weight", 2)[0],
        num_heads=heads,
        num_layers=count_blocks(shapes, r"blocks\.(\d+)\."),
        num_buckets=buckets,
    )


def check_fit(dit: DiTConfig, vae: VAEConfig, text_encoder: UMT5Config) -> None:
    """Raises UserError if the parts, each complete by itself, are not of one text-to-video model."""
    if dit.out_dim != vae.z_dim:  # in_dim is the same: see other_models.py
        got = f"the DiT takes {dit.in_dim} channels and gives {dit.out_dim}, the VAE has {vae.z_dim}"
        raise UserError(f"{got}: is it an image-to-video model, or of another version? Get a text-to-video one")
    if dit.text_dim != text_encoder.dim:
        got = f"the DiT reads text of width {dit.text_dim}, the encoder gives {text_encoder.dim}"
        raise UserError(f"{got}: get the encoder that belongs to it")
    if dit.patch_size != PATCH:
        raise UserError(f"the DiT has patches of {dit.patch_size}, Wan 2.1's are {PATCH}: get another version")


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """How many blocks the names number, from 0; the pattern's first group is the number.

    Raises UserError on more than any model has: a number costs nothing to write, and a block's module does.
    """
    count = 0
    for name in names:
        match = re.match(pattern, name)
        if match:
            count = max(count, int(match[1]) + 1)
            if count > MAX_BLOCKS:
                raise UserError(f"tensor {name[:60]} is of more than {MAX_BLOCKS} blocks")
    return count


def _sides(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    """A tensor's shape. Raises KeyError if it is missing, UserError if it has not so many sides, or absurd ones."""
    shape = shapes[name]
    if len(shape) != rank or min(shape) < 1 or max(shape) > MAX_WIDTH:
        raise UserError(f"{name} must have {rank} sides from 1 to {MAX_WIDTH}, got {shape}")
    return shape


CONFIGS = {"dit": dit_config, "vae": vae_config, "text_encoder": umt5_config}
