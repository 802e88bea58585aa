"""The VAE's forward pass for training: the same function as vae.py, on whole clips and in channels-last memory.

vae.py streams a clip chunk by chunk to save memory. Training has short clips and wants speed: here all frames go
through each layer at once, a causal convolution over time is a sum of 2D convolutions, and norm and activation are one
compiled kernel. Time comes first, so that a slice of it is one piece of memory: tensors are (T,B,H,W,C).
"""

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.vae import (
    AttentionBlock,
    CausalConv3d,
    CausalSequential,
    Downsample,
    ResidualBlock,
    RMSNorm,
    Upsample,
    WanVAE,
)


@cache
def compiled(function: Callable[..., Tensor], dynamic: bool) -> Callable[..., Tensor]:
    """A function as one kernel chain where this machine has a C++ compiler, else as it is; compiled at first calls."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return function
    torch._dynamo.config.recompile_limit = 64  # one kernel for each number of channels or shape of a batch
    return torch.compile(function, dynamic=dynamic)


def encode(vae: WanVAE, video: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalized latents of a video; as WanVAE.encode.

    video: (B,3,T,H,W) in [-1,1], T = 4k+1. dtype: of the matrix products. Returns float32 (B,16,k+1,H/8,W/8).
    """
    x = video.permute(2, 0, 3, 4, 1).to(dtype).contiguous()  # (B,3,T,H,W) -> (T,B,H,W,3)
    moments = _apply(vae.encoder, x)  # -> (F,B,h,w,32)
    channels = vae.config.z_dim
    weight = vae.conv1.weight[:channels].flatten(1)  # of the means alone: (16,32,1,1,1) -> (16,32)
    latents = F.linear(moments, weight.to(dtype), cast(Tensor, vae.conv1.bias)[:channels].to(dtype))
    mean, std = vae.statistics(video)
    return (latents.float().permute(1, 4, 0, 2, 3) - mean) / std  # (F,B,h,w,16) -> (B,16,F,h,w)


def decode(vae: WanVAE, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """The video of normalized latents; as WanVAE.decode. (B,16,F,h,w) -> float32 (B,3,4F-3,8h,8w)."""
    mean, std = vae.statistics(latents)
    z = (latents.float() * std + mean).permute(2, 0, 3, 4, 1).to(dtype)  # (B,16,F,h,w) -> (F,B,h,w,16)
    video = _apply(vae.decoder, _pointwise(vae.conv2, z))  # -> (T,B,H,W,3)
    return video.float().permute(1, 4, 0, 2, 3)  # -> (B,3,T,H,W)


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    """One layer of the VAE on all frames of a clip, (T,B,H,W,C) -> (T',B,H',W',C')."""
    if isinstance(layer, CausalSequential):
        return _sequential(layer, x)
    if isinstance(layer, CausalConv3d):
        return _causal_conv(layer, x)
    if isinstance(layer, ResidualBlock):
        return _apply(layer.shortcut, x) + _sequential(layer.residual, x)
    if isinstance(layer, nn.Conv3d):  # a shortcut
        return _pointwise(layer, x)
    if isinstance(layer, AttentionBlock):
        return x + _attention(layer, x)
    if isinstance(layer, Downsample):
        return _downsample(layer, x)
    if isinstance(layer, Upsample):
        return _upsample(layer, x)
    return layer(x)  # nn.Identity


def _sequential(layers: CausalSequential, x: Tensor) -> Tensor:
    """All layers in a row; a norm and the activation behind it are one kernel."""
    for layer in layers:
        if isinstance(layer, RMSNorm):
            rows = compiled(_norm_then_silu, True)(x.reshape(-1, x.shape[-1]), layer.gamma)
            x = rows.view(x.shape)
        elif not isinstance(layer, nn.SiLU):
            x = _apply(layer, x)
    return x


class _CausalConv(torch.autograd.Function):
    """A causal convolution over time as one 2D convolution for each of its taps, added up in place.

    x (T,B,H,W,C), weight (C',C,taps,kh,kw), bias (C'). Tap number taps-1 sees the frame itself, the others the frames
    before it. PyTorch's own 3D convolution has no fast backward pass for bfloat16 on CPUs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        taps = weight.shape[2]
        y = _conv(x, weight[:, :, -1], bias, weight.shape[-1] // 2)
        for back in range(1, min(taps, len(x))):
            y[back:] += _conv(x[:-back], weight[:, :, taps - 1 - back], None, weight.shape[-1] // 2)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        taps = weight.shape[2]
        gradient = gradient.contiguous()
        grad_weight = torch.zeros_like(weight)
        grad_x, grad_weight[:, :, -1], grad_bias = _conv_backward(gradient, x, weight[:, :, -1])
        for back in range(1, min(taps, len(x))):
            tap = taps - 1 - back
            part, grad_weight[:, :, tap], _ = _conv_backward(gradient[back:], x[:-back], weight[:, :, tap])
            grad_x[:-back] += part
        return grad_x, grad_weight, grad_bias


def _conv_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (T,B,H,W,C), a 2D weight and a bias, given the output's (T,B,H,W,C')."""
    sizes = [weight.shape[0]]
    side = weight.shape[-1] // 2
    weight = weight.contiguous(memory_format=torch.channels_last)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        _images(gradient), _images(x), weight, sizes, [1, 1], [side, side], [1, 1], False, [0, 0], 1, [True] * 3
    )
    return _clips(grad_x, x).contiguous(), grad_weight, grad_bias


def _causal_conv(layer: CausalConv3d, x: Tensor) -> Tensor:
    """Convolution over time, rows and columns, of frames with zeros before the first."""
    return _CausalConv.apply(x, layer.weight.to(x.dtype), cast(Tensor, layer.bias).to(x.dtype))


def _images(x: Tensor) -> Tensor:
    """(T,B,H,W,C) -> (T*B,C,H,W), channels last in memory: nothing moves."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def _clips(images: Tensor, like: Tensor) -> Tensor:
    """(T*B,C,H,W) -> (T,B,H,W,C) with T and B of another clip."""
    return images.permute(0, 2, 3, 1).unflatten(0, like.shape[:2])


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, stride: int = 1) -> Tensor:
    """A 2D convolution of every frame, (T,B,H,W,C) -> (T,B,H',W',C')."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    return _clips(F.conv2d(_images(x), weight, bias, stride, padding), x)


def _pointwise(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution with a kernel of one position is a linear layer."""
    return F.linear(x, layer.weight.flatten(1).to(x.dtype), cast(Tensor, layer.bias).to(x.dtype))


def _attention(layer: AttentionBlock, x: Tensor) -> Tensor:
    """Self-attention with one head over the positions of each frame."""
    tokens = x.flatten(0, 1).flatten(1, 2)  # (T,B,H,W,C) -> (T*B,H*W,C)
    q, k, v = _pointwise(layer.to_qkv, _norm(tokens, layer.norm.gamma)).chunk(3, dim=-1)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # (T*B,H*W,H*W)
    return _pointwise(layer.proj, weights @ v).view_as(x)


def _downsample(layer: Downsample, x: Tensor) -> Tensor:
    """Halve rows and columns; if temporal, make one frame of two but for the first."""
    conv = cast(nn.Conv2d, layer.resample[1])
    x = F.pad(x, (0, 0, 0, 1, 0, 1))  # one column and one row behind the others
    x = _conv(x, conv.weight.to(x.dtype), cast(Tensor, conv.bias).to(x.dtype), 0, 2)
    if layer.time_conv is None or len(x) == 1:
        return x
    weight = layer.time_conv.weight.flatten(2).to(x.dtype)  # (C,C,3,1,1) -> (C,C,3)
    y = F.linear(x[2::2], weight[:, :, 2], cast(Tensor, layer.time_conv.bias).to(x.dtype))
    y = y + F.linear(x[1::2], weight[:, :, 1]) + F.linear(x[:-1:2], weight[:, :, 0])
    return torch.cat([x[:1], y])  # 1 and (T-1)/2 frames


def _upsample(layer: Upsample, x: Tensor) -> Tensor:
    """Double rows and columns, halve the channels; if temporal, first make two frames of each but the first."""
    if layer.time_conv is not None and len(x) > 1:
        pairs = _causal_conv(layer.time_conv, x[1:])  # (T-1,B,H,W,2C)
        pairs = pairs.unflatten(-1, (2, -1)).movedim(-2, 1).flatten(0, 1)  # -> (T-1,2,B,H,W,C) -> (2T-2,B,H,W,C)
        x = torch.cat([x[:1], pairs])
    conv = cast(nn.Conv2d, layer.resample[1])
    images = F.interpolate(_images(x), scale_factor=2)  # (T*B,C,H,W) -> (T*B,C,2H,2W), channels last
    return _clips(F.conv2d(images, conv.weight.to(x.dtype), cast(Tensor, conv.bias).to(x.dtype), padding=1), x)


def _norm(x: Tensor, gamma: Tensor) -> Tensor:
    """RMSNorm of vae.py with channels last, (...,C)."""
    y = x.float()
    size = y.square().sum(-1, keepdim=True).clamp(min=1e-24).rsqrt()
    return (y * size * (gamma.float().flatten() * x.shape[-1] ** 0.5)).to(x.dtype)


def _norm_then_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """(rows,C): eager PyTorch reads and writes memory six times for it."""
    return F.silu(_norm(x, gamma).float()).to(x.dtype)
