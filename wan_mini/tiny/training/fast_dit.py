"""The DiT's forward pass for training: the same function as dit.py, with one compiled kernel chain a block.

Matrix products of blocks run in `dtype`, all else in float32. Three parts differ from dit.py in form and not in value:
products of the same input are one product; attention is written out, because its gradient is then matrix products too;
and the partner that RoPE mixes into a channel, q[1], -q[0], q[3], ..., comes out of a product with the weight's rows
swapped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.dit import EPS, Attention, Block, WanDiT
from wan_mini.tiny.training.fast_vae import compiled


def velocity(
    dit: WanDiT,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    dtype: torch.dtype,
    *,
    qk_block: int | None = None,
    qk_clips: int = 0,
) -> tuple[Tensor, Tensor]:
    """Velocity of noisy latents as WanDiT.forward, and with qk_block that block's q and k of the first qk_clips clips.

    latents (B,16,F,2H,2W), timestep (B,), text (B,L,text_dim). Returns float32 (B,16,F,2H,2W), and
    (2,qk_clips,N,M,D) float32, which is empty without qk_block.
    """
    x, time, modulation, text, rope = dit.embed(latents, timestep, text)
    text = text.to(dtype)
    cos, sin = (wave.repeat_interleave(2, -1) for wave in rope)  # (N,1,D/2) -> (N,1,D): one for each channel
    qk = x.new_empty(0)
    for index, block in enumerate(dit.blocks):
        assert isinstance(block, Block)
        if index == qk_block:
            qk = torch.stack(block.qk(x[:qk_clips], modulation[:qk_clips], rope))
        x = compiled(block_forward, False)(block, x, modulation, text, cos, sin)
    return dit.unpatchify(dit.head(x, time), dit.grid(latents)), qk


def block_forward(block: Block, x: Tensor, time: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Block.forward: x (B,N,C) float32, time (B,6,C), text (B,L,C) in the dtype of products, cos and sin (N,1,D)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + time).chunk(6, dim=1)  # 6 x (B,1,C)
    h = (block.norm1(x) * (1 + scale1) + shift1).to(text.dtype)
    x = x + gate1 * _self_attention(block.self_attn, h, cos, sin)
    x = x + _cross_attention(block.cross_attn, block.norm3(x).to(text.dtype), text)
    h = (block.norm2(x) * (1 + scale2) + shift2).to(text.dtype)
    return x + gate2 * _linear(block.ffn[2], _gelu(_linear(block.ffn[0], h)))


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, by 1 + tanh(u) = 2 sigmoid(2u): an exponential is faster than a tanh."""
    y = x.float()
    return (y * torch.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))).to(x.dtype)


def _swapped(weight: Tensor) -> Tensor:
    """Rows a, b, c, d, ... -> -b, a, -d, c, ..."""
    return torch.stack([-weight[1::2], weight[::2]], dim=1).flatten(0, 1)


def _self_attention(layer: Attention, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Tokens h (B,N,C) attend to themselves -> (B,N,C) in the same dtype."""
    weights = [layer.q.weight, layer.k.weight, layer.v.weight, _swapped(layer.q.weight), _swapped(layer.k.weight)]
    biases = [layer.q.bias, layer.k.bias, layer.v.bias, _swapped(layer.q.bias), _swapped(layer.k.bias)]
    products = F.linear(h, torch.cat(weights).to(h.dtype), torch.cat(biases).to(h.dtype))  # (B,N,5C)
    q, k, v, q_swap, k_swap = products.chunk(5, dim=-1)
    scale = (h.shape[-1] // layer.num_heads) ** -0.5
    q = _rotate(q, q_swap, layer.norm_q.weight * scale, layer.num_heads, cos, sin)
    k = _rotate(k, k_swap, layer.norm_k.weight, layer.num_heads, cos, sin)
    return _linear(layer.o, _attend(q, k, v.unflatten(-1, (layer.num_heads, -1))))


def _rotate(x: Tensor, swap: Tensor, weight: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm, then RoPE: x and its swapped channels (B,N,C) -> (B,N,M,D) in the dtype of x."""
    y = x.float()
    size = torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
    normed = (y * size * weight).unflatten(-1, (heads, -1))
    swapped_weight = weight.view(-1, 2).flip(1).flatten()
    normed_swap = (swap.float() * size * swapped_weight).unflatten(-1, (heads, -1))
    return (normed * cos + normed_swap * sin).to(x.dtype)


def _cross_attention(layer: Attention, h: Tensor, text: Tensor) -> Tensor:
    """Tokens h (B,N,C) attend to text (B,L,C) -> (B,N,C), all in one dtype."""
    heads = (layer.num_heads, -1)
    scale = (h.shape[-1] // layer.num_heads) ** -0.5
    q = _rms_norm(_linear(layer.q, h), layer.norm_q.weight * scale).unflatten(-1, heads)
    k = _rms_norm(_linear(layer.k, text), layer.norm_k.weight).unflatten(-1, heads)
    v = _linear(layer.v, text).unflatten(-1, heads)
    return _linear(layer.o, _attend(q, k, v))


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v, the scale being in q: (B,N,M,D), (B,L,M,D), (B,L,M,D) -> (B,N,C)."""
    logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)  # (B,M,N,D) x (B,M,D,L) -> (B,M,N,L)
    weights = logits.float().softmax(-1).to(v.dtype)
    return (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)  # (B,M,N,D) -> (B,N,M,D) -> (B,N,C)
