"""The Wan 2.1 VAE: a video becomes latents with 4 times fewer frames and 8 times shorter sides, and comes back.

Every convolution looks back in time only, so a clip of any length streams through in chunks, in constant memory:

    encode    frames 1 | 4 | 4 | 4 | ...           ->   latent frames 1 | 1 | 1 | 1 | ...
    decode    latent frames 1 | 1 | 1 | 1 | ...    ->   frames 1 | 4 | 4 | 4 | ...

The first frame is a chunk of its own, because Wan treats it as an image: it is never halved or doubled in time.
What a layer must remember from one chunk to the next is its feature cache. The caller owns it, no module stores it:

    y, cache = layer(x, cache)      # cache is None at the first frame of a clip

Source: Wan technical report (arXiv 2503.20314), section 4.1; names and numbers from wan/modules/vae.py of Wan 2.1.
Shapes: video (B,3,T,H,W), latents (B,16,F,h,w); inside a layer (B,C,T,H,W), or (B*T,C,H,W) for images.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.config import SPATIAL_STRIDE, TIME_STRIDE, VAEConfig, frames_of
from wan_mini.errors import UserError
from wan_mini.tiling import Progress, apply_in_chunks

Cache = Tensor | list | None  # last frames before a chunk; a CausalSequential's is a list; None: nothing to remember

VIDEO_CHANNELS = 3
TILE_MULTIPLE = 4 * SPATIAL_STRIDE  # pixels: a quarter of a tile, the overlap, is then a whole number of latents
DOWNSAMPLINGS = 3  # each halves height and width; the last two also halve time


class CausalLayer(nn.Module):
    """A layer that takes a clip chunk by chunk: forward(x, cache) -> (y, cache)."""


class CausalSequential(CausalLayer, nn.Sequential):
    """Layers in a row. Their caches are a list, written over in place: old and new together would be twice as much."""

    def forward(self, x: Tensor, cache: list | None = None) -> tuple[Tensor, list]:
        """x (B,C,T,H,W), cache of the chunk before it -> result and cache."""
        caches: list[Cache] = cache or [None] * len(self)
        for index, layer in enumerate(self):
            if isinstance(layer, CausalLayer):
                x, caches[index] = layer(x, caches[index])
            else:
                x = layer(x)
        return x, caches


class CausalConv3d(CausalLayer, nn.Conv3d):
    """3D convolution with all its temporal padding in front: the cached frames if there are any, else zeros.

    A kernel of 3 frames reaches back over 2, or over 1 when it moves in strides of 2.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int] = (3, 3, 3), stride: int = 1):
        super().__init__(in_dim, out_dim, kernel, (stride, 1, 1), padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.cache_frames = kernel[0] - stride

    def zero_cache(self, x: Tensor) -> Tensor:
        """Return the cache at the start of a clip: zeros, (B,C,cache_frames,H,W)."""
        b, c, _, h, w = x.shape
        return x.new_zeros(b, c, self.cache_frames, h, w)

    def forward(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x (B,C,T,H,W), cache (B,C,cache_frames,H,W) -> (B,C',T/stride,H,W) and the next chunk's cache."""
        before = self.zero_cache(x) if cache is None else cache
        whole = torch.cat([before, x], dim=2)  # (B,C,T,H,W) -> (B,C,cache_frames+T,H,W)
        if cache is None and x.shape[2] == 1:  # zeros before a first frame add nothing: only the last tap counts
            y = self.convolve(x, self.weight[:, :, -1:])
        else:
            y = self.convolve(whole, self.weight)
        return y, whole[:, :, -self.cache_frames :].clone()  # a view would keep the whole chunk in memory

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Slide a kernel (C',C,taps,kh,kw) over (B,C,T,H,W) -> (B,C',(T-taps)/stride+1,H,W); no padding in time."""
        padding = cast(tuple[int, ...], self.padding)
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if on_cpu and torch.backends.mkldnn.is_available():
            # The same as below, but for small clips PyTorch would pick another kernel, up to 20 times slower.
            return torch.mkldnn_convolution(x, weight, self.bias, padding, self.stride, self.dilation, self.groups)
        return F.conv3d(x, weight, self.bias, self.stride, padding)


class RMSNorm(nn.Module):
    """Bring the channels at each position to root mean square 1, then scale each by a learned gain.

    Computed in float32 for any weights, so that bfloat16 rounds once, at the end, and not at every step.
    """

    def __init__(self, dim: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))  # broadcasts over the axes behind the channels

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,...) -> same shape and dtype."""
        y = x.float()
        length = y.square().sum(dim=1, keepdim=True).clamp(min=1e-24).sqrt()  # F.normalize's, which is slow on a CPU
        gain = self.gamma.float() * len(self.gamma) ** 0.5
        return (y / length * gain).to(x.dtype)


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an image layer (B*T,C,H,W) -> (B*T,C',H',W') to each frame of a clip: (B,C,T,H,W) -> (B,C',T,H',W')."""
    y = layer(x.transpose(1, 2).flatten(0, 1))  # (B,C,T,H,W) -> (B*T,C,H,W) -> (B*T,C',H',W')
    return y.unflatten(0, (len(x), -1)).transpose(1, 2)  # -> (B,C',T,H',W')


class ResidualBlock(CausalLayer):
    """Two causal convolutions, each after norm and activation, beside a shortcut."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = CausalSequential(
            RMSNorm(in_dim),
            nn.SiLU(inplace=True),
            CausalConv3d(in_dim, out_dim),
            RMSNorm(out_dim),
            nn.SiLU(inplace=True),
            nn.Identity(),  # stands for the original's dropout (rate 0), so that the last layer's name stays residual.6
            CausalConv3d(out_dim, out_dim),
        )
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, cache: list | None = None) -> tuple[Tensor, list]:
        """x (B,C,T,H,W) -> (B,C',T,H,W) and the cache of both convolutions."""
        y, cache = self.residual(x, cache)
        return self.shortcut(x) + y, cache


class AttentionBlock(nn.Module):
    """Self-attention with one head over the positions of a frame; frames do not see each other."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def attend(self, x: Tensor) -> Tensor:
        """Frames (B*T,C,H,W) -> what attention adds to them, same shape."""
        qkv = self.to_qkv(self.norm(x)).flatten(2).mT  # (B*T,C,H,W) -> (B*T,3C,H*W) -> (B*T,H*W,3C)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # -> (B*T,1,H*W,C) each
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # -> (B*T,H*W,C)
        return self.proj(y.mT.unflatten(2, x.shape[2:]))  # -> (B*T,C,H,W)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,T,H,W) -> same shape."""
        return x + per_frame(self.attend, x)


class Downsample(CausalLayer):
    """Halve height and width; if temporal, then turn two frames into one, everywhere but at the clip's first frame."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=2) if temporal else None

    def forward(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B,C,T,H,W) -> (B,C,T/2,H/2,W/2), or T frames if not temporal or the clip's first, and the cache."""
        x = per_frame(self.resample, x)  # (B,C,T,H,W) -> (B,C,T,H/2,W/2)
        if self.time_conv is None:
            return x, None
        if cache is None:  # the first frame passes unchanged, and is the cache of the frames behind it
            return x, x
        return self.time_conv(x, cache)  # (B,C,T,H,W) -> (B,C,T/2,H,W)


class Upsample(CausalLayer):
    """Double height and width, halve the channels; if temporal, first make two frames of each but the clip's first."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        # At a factor of 2, the default "nearest" gives the same as the original's "nearest-exact".
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B,C,T,H,W) -> (B,C/2,2T,2H,2W), or T frames if not temporal or the clip's first, and the cache."""
        if self.time_conv is not None:
            if cache is None:  # the first frame stays single, and time_conv never sees it: it begins at the second
                cache = self.time_conv.zero_cache(x)
            else:
                x, cache = self.time_conv(x, cache)  # (B,C,T,H,W) -> (B,2C,T,H,W): two frames side by side
                x = x.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)  # -> (B,C,T,2,H,W) -> (B,C,2T,H,W)
        return per_frame(self.resample, x), cache  # (B,C,T,H,W) -> (B,C/2,T,2H,2W)


def encoder(config: VAEConfig) -> CausalSequential:
    """Make (B,3,T,H,W) -> (B,2*z_dim,F,h,w), mean and log-variance: 3 steps halve space, the last 2 also halve time."""
    dim = config.dim
    levels: list[nn.Module] = []
    for level, mult in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            levels.append(ResidualBlock(dim, config.dim * mult))
            dim = config.dim * mult
        if level < DOWNSAMPLINGS:
            levels.append(Downsample(dim, temporal=level > 0))
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv1"] = CausalConv3d(VIDEO_CHANNELS, config.dim)
    parts["downsamples"] = CausalSequential(*levels)
    parts["middle"] = CausalSequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))
    parts["head"] = CausalSequential(RMSNorm(dim), nn.SiLU(inplace=True), CausalConv3d(dim, 2 * config.z_dim))
    return CausalSequential(parts)


def decoder(config: VAEConfig) -> CausalSequential:
    """Make (B,z_dim,F,h,w) -> (B,3,T,H,W): the encoder mirrored, with one more block per level."""
    dim = config.dim * config.dim_mult[-1]
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv1"] = CausalConv3d(config.z_dim, dim)
    parts["middle"] = CausalSequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))
    levels: list[nn.Module] = []
    for level, mult in enumerate(reversed(config.dim_mult)):
        for _ in range(config.num_res_blocks + 1):
            levels.append(ResidualBlock(dim, config.dim * mult))
            dim = config.dim * mult
        if level < DOWNSAMPLINGS:
            levels.append(Upsample(dim, temporal=level < DOWNSAMPLINGS - 1))
            dim //= 2
    parts["upsamples"] = CausalSequential(*levels)
    parts["head"] = CausalSequential(RMSNorm(dim), nn.SiLU(inplace=True), CausalConv3d(dim, VIDEO_CHANNELS))
    return CausalSequential(parts)


class WanVAE(nn.Module):
    """The VAE; its state dict is the original checkpoint's, and the latents' statistics stay in the config.

    Both directions run whole frames or, with `tile` (pixels, a multiple of 32), overlapping, linearly blended tiles.
    These bound memory, but none sees past its edges, so the result is close to that of whole frames, not equal.
    `progress` wraps the list of steps, as tqdm does. Gradients flow: use torch.no_grad() where none are needed.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = decoder(config)

    def encode(self, video: Tensor, *, tile: int | None = None, progress: Progress | None = None) -> Tensor:
        """Turn a video into normalized latents, (mean - config.mean) / config.std; nothing is sampled.

        video: (B,3,T,H,W) in [-1,1], T = 4k+1, H and W multiples of 8. Returns float32 (B,16,k+1,H/8,W/8).
        Raises UserError for any other shape or tile.
        """
        _check("video", video, VIDEO_CHANNELS, tile)
        b, _, frames, height, width = video.shape
        if frames % TIME_STRIDE != 1 or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            expected = f"{TIME_STRIDE}k+1 frames and sides in multiples of {SPATIAL_STRIDE}"
            raise UserError(f"video needs {expected}, got {frames} frames of {height}x{width}: crop it")
        chunks = [1] + [TIME_STRIDE] * (frames // TIME_STRIDE)
        channels = 2 * self.config.z_dim  # mean and log-variance
        shape = (b, channels, len(chunks), height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
        moments = apply_in_chunks(self.encoder, video, chunks, shape, tile, progress)  # (B,3,T,H,W) -> (B,32,F,h,w)
        mu, _ = self.conv1(moments.to(self.conv1.weight.dtype)).float().chunk(2, dim=1)  # -> (B,16,F,h,w)
        mean, std = self.statistics(mu)
        return (mu - mean) / std

    def decode(self, latents: Tensor, *, tile: int | None = None, progress: Progress | None = None) -> Tensor:
        """Turn normalized latents into a video, one latent frame at a time.

        latents: (B,16,F,h,w). Returns float32 (B,3,4F-3,8h,8w), about [-1,1] but not clamped.
        Raises UserError for any other shape or tile.
        """
        _check("latents", latents, self.config.z_dim, tile)
        b, _, f, h, w = latents.shape
        mean, std = self.statistics(latents)
        z = self.conv2((latents.float() * std + mean).to(self.conv2.weight.dtype))
        shape = (b, VIDEO_CHANNELS, frames_of(f), SPATIAL_STRIDE * h, SPATIAL_STRIDE * w)
        return apply_in_chunks(self.decoder, z, [1] * f, shape, tile, progress)  # (B,16,F,h,w) -> (B,3,T,H,W)

    def statistics(self, like: Tensor) -> Tensor:
        """Return mean and std of the latent channels, (2,16,1,1,1). No buffer, which would be in the state dict."""
        statistics = torch.tensor([self.config.mean, self.config.std], device=like.device)  # (2,16)
        return statistics[:, :, None, None, None]


def _check(name: str, x: Tensor, channels: int, tile: int | None) -> None:
    """Raise UserError unless x is (batch, channels, frames, height, width) and tile can be one."""
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise UserError(f"{name} must be (batch, {channels}, frames, height, width), got {tuple(x.shape)}")
    if tile is not None and (tile < TILE_MULTIPLE or tile % TILE_MULTIPLE):
        raise UserError(f"tile must be a positive multiple of {TILE_MULTIPLE} pixels, or None, got {tile}")
