"""The Wan 2.1 VAE: a video becomes latents with 4 times fewer frames and 8 times shorter sides, and comes back.

Every convolution looks back in time only, so a clip of any length streams through in chunks, in constant memory:

    encode    frames 1 | 4 | 4 | 4 | ...           ->   latent frames 1 | 1 | 1 | 1 | ...
    decode    latent frames 1 | 1 | 1 | 1 | ...    ->   frames 1 | 4 | 4 | 4 | ...

The first frame is a chunk of its own, because Wan treats it as an image: it is never halved or doubled in time.
What a layer must remember from one chunk to the next is its `past`. The caller owns it, no module stores it:

    y, past = layer(x, past)        # past is None at the first frame of a clip

Source: Wan technical report (arXiv 2503.20314), section 4.1; names and numbers from wan/modules/vae.py of Wan 2.1.
Shapes: video (B,3,T,H,W), latents (B,16,F,h,w); inside a layer (B,C,T,H,W), or (B*T,C,H,W) for images.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.config import VAEConfig

Past = Tensor | list | None  # the frames before a chunk; for a Stack, one Past per layer; None: nothing to remember


class Streaming(nn.Module):
    """A layer that takes a clip chunk by chunk: forward(x, past) -> (y, past)."""


class Stack(Streaming, nn.Sequential):
    """Layers in a row. Their pasts are a list, written over in place: old and new together would be twice as much."""

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        past = past or [None] * len(self)
        for i, layer in enumerate(self):
            x, past[i] = layer(x, past[i]) if isinstance(layer, Streaming) else (layer(x), None)
        return x, past


class CausalConv3d(Streaming, nn.Conv3d):
    """3D convolution with all its temporal padding in front: the past if there is one, else zeros.

    A kernel of 3 frames reaches back over 2, or over 1 when it moves in strides of 2.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int] = (3, 3, 3), stride: int = 1):
        super().__init__(in_dim, out_dim, kernel, (stride, 1, 1), padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.reach = kernel[0] - stride

    def blank(self, x: Tensor) -> Tensor:
        """Return the past of a clip that has not begun."""
        b, c, _, h, w = x.shape
        return x.new_zeros(b, c, self.reach, h, w)

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        whole = torch.cat([self.blank(x) if past is None else past, x], dim=2)  # (B,C,T,H,W) -> (B,C,reach+T,H,W)
        alone = past is None and x.shape[2] == 1  # zeros before a first frame add nothing: only the last tap counts
        y = self.convolve(x, self.weight[:, :, -1:]) if alone else self.convolve(whole, self.weight)
        return y, whole[:, :, -self.reach :].clone()  # a view would keep the whole chunk in memory

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Slide a kernel (C',C,taps,kh,kw) over (B,C,T,H,W) -> (B,C',(T-taps)/stride+1,H,W); no padding in time."""
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if plain and torch.backends.mkldnn.is_available():
            # The same as below, but for small clips PyTorch would pick another kernel, up to 20 times slower.
            return torch.mkldnn_convolution(x, weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        return F.conv3d(x, weight, self.bias, self.stride, self.padding)


class RMSNorm(nn.Module):
    """Bring the channels at each position to root mean square 1, then scale each by a learned gain.

    Computed in float32 for any weights, so that bfloat16 rounds once, at the end, and not at every step.
    """

    def __init__(self, dim: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))  # broadcasts over the axes behind the channels

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        size = y.square().sum(dim=1, keepdim=True).clamp(min=1e-24).sqrt()  # F.normalize's, which is slow on a CPU
        return (y / size * (self.gamma.float() * len(self.gamma) ** 0.5)).to(x.dtype)


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an image layer to each frame of a clip."""
    y = layer(x.transpose(1, 2).flatten(0, 1))  # (B,C,T,H,W) -> (B*T,C,H,W) -> (B*T,C',H',W')
    return y.unflatten(0, (len(x), -1)).transpose(1, 2)  # -> (B,C',T,H',W')


class ResidualBlock(Streaming):
    """Two causal convolutions, each after norm and activation, beside a shortcut."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = Stack(
            RMSNorm(in_dim),
            nn.SiLU(inplace=True),
            CausalConv3d(in_dim, out_dim),
            RMSNorm(out_dim),
            nn.SiLU(inplace=True),
            nn.Identity(),  # stands for the original's dropout (rate 0), so that the last layer's name stays residual.6
            CausalConv3d(out_dim, out_dim),
        )
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        y, past = self.residual(x, past)
        return self.shortcut(x) + y, past


class AttentionBlock(nn.Module):
    """Self-attention with one head over the positions of a frame; frames do not see each other."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def attend(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).mT  # (B*T,C,H,W) -> (B*T,3C,H*W) -> (B*T,H*W,3C)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # -> (B*T,1,H*W,C) each
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # -> (B*T,H*W,C)
        return self.proj(y.mT.unflatten(2, x.shape[2:]))  # -> (B*T,C,H,W)

    def forward(self, x: Tensor) -> Tensor:
        return x + per_frame(self.attend, x)


class Downsample(Streaming):
    """Halve height and width; if temporal, then turn two frames into one, everywhere but at the clip's first frame."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=2) if temporal else None

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        x = per_frame(self.resample, x)  # (B,C,T,H,W) -> (B,C,T,H/2,W/2)
        if self.time_conv is None:
            return x, None
        if past is None:  # the first frame passes unchanged, and is the past of the frames behind it
            return x, x
        return self.time_conv(x, past)  # (B,C,T,H,W) -> (B,C,T/2,H,W)


class Upsample(Streaming):
    """Double height and width, halve the channels; if temporal, first make two frames of each but the clip's first."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        # At a factor of 2, the default "nearest" gives the same as the original's "nearest-exact".
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        if self.time_conv is not None:
            if past is None:  # the first frame stays single, and time_conv never sees it: it begins at the second
                past = self.time_conv.blank(x)
            else:
                x, past = self.time_conv(x, past)  # (B,C,T,H,W) -> (B,2C,T,H,W): two frames side by side
                x = x.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)  # -> (B,C,T,2,H,W) -> (B,C,2T,H,W)
        return per_frame(self.resample, x), past  # (B,C,T,H,W) -> (B,C/2,T,2H,2W)


def encoder(config: VAEConfig) -> Stack:
    """Make (B,3,T,H,W) -> (B,2*z_dim,F,h,w), mean and log-variance: 3 steps halve space, the last 2 also halve time."""
    dim, levels = config.dim, []
    for level, mult in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            levels.append(ResidualBlock(dim, config.dim * mult))
            dim = config.dim * mult
        if level < 3:
            levels.append(Downsample(dim, temporal=level > 0))
    parts = OrderedDict(conv1=CausalConv3d(3, config.dim), downsamples=Stack(*levels))
    parts["middle"] = Stack(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))
    parts["head"] = Stack(RMSNorm(dim), nn.SiLU(inplace=True), CausalConv3d(dim, 2 * config.z_dim))
    return Stack(parts)


def decoder(config: VAEConfig) -> Stack:
    """Make (B,z_dim,F,h,w) -> (B,3,T,H,W): the encoder mirrored, with one more block per level."""
    dim, levels = config.dim * config.dim_mult[-1], []
    parts = OrderedDict(conv1=CausalConv3d(config.z_dim, dim))
    parts["middle"] = Stack(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))
    for level, mult in enumerate(reversed(config.dim_mult)):
        for _ in range(config.num_res_blocks + 1):
            levels.append(ResidualBlock(dim, config.dim * mult))
            dim = config.dim * mult
        if level < 3:
            levels.append(Upsample(dim, temporal=level < 2))
            dim //= 2
    parts["upsamples"] = Stack(*levels)
    parts["head"] = Stack(RMSNorm(dim), nn.SiLU(inplace=True), CausalConv3d(dim, 3))
    return Stack(parts)


def cut(source: int, target: int, tile: int | None) -> list[tuple[slice, slice, Tensor]]:
    """Cut one side of the frame, `source` long before a network and `target` long after it, into tiles.

    `tile` is in pixels, the longer unit of the two; neighbors overlap by a quarter or more; None makes a single tile.
    Returns for each its slice of source and of target, and its weights in the target: linear ramps over the overlap,
    divided by their sum over all tiles (so a single tile weighs exactly 1).
    """
    side = max(source, target)
    tile = min(tile or side, side)
    overlap = tile // 4
    starts = [min(start, side - tile) for start in range(0, side - overlap, tile - overlap)]
    places = [[slice(start * n // side, (start + tile) * n // side) for n in (source, target)] for start in starts]
    ramp = (torch.arange(tile * target // side) + 0.5) * side / (overlap * target)
    weight = torch.minimum(ramp, ramp.flip(0)).clamp(max=1)
    total = torch.zeros(target)
    for _, place in places:
        total[place] += weight
    return [(origin, place, weight / total[place]) for origin, place in places]


def stream(
    network: Stack, clip: Tensor, chunks: list[int], shape: tuple[int, ...], tile: int | None, progress: Callable | None
) -> Tensor:
    """Send a clip through a network in chunks of so many frames; returns float32 of the given shape.

    Each tile sees the whole clip before the next one starts, so only one tile's past is ever in memory.
    """
    out = torch.zeros(shape, device=clip.device)
    dtype = next(network.parameters()).dtype
    rows, columns = (cut(n, m, tile) for n, m in zip(clip.shape[3:], shape[3:]))
    steps = list(product(rows, columns, enumerate(clip.split(chunks, dim=2))))
    for (row, out_row, row_weight), (column, out_column, column_weight), (i, chunk) in (progress or iter)(steps):
        if i == 0:
            past, start = None, 0
        y, past = network(chunk[..., row, column].to(dtype), past)  # the chunk's frames, within this tile
        place = out[:, :, start : start + y.shape[2], out_row, out_column]
        place += y * torch.outer(row_weight, column_weight).to(y.device)
        start += y.shape[2]
    return out


class WanVAE(nn.Module):
    """The VAE; its state dict is the original checkpoint's, and the latents' statistics stay in the config.

    Both directions run whole frames or, with `tile` (pixels, a multiple of 32), overlapping, linearly blended tiles.
    These bound memory, but none sees past its edges, so the result is close to that of whole frames, not equal.
    `progress` wraps the list of steps, as tqdm does. Gradients flow: use torch.no_grad() where none are needed.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        if len(config.dim_mult) != 4:
            raise ValueError(f"dim_mult must have 4 levels (3 of them halve space), got {config.dim_mult}")
        self.config = config
        self.encoder = encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = decoder(config)

    def encode(self, video: Tensor, *, tile: int | None = None, progress: Callable | None = None) -> Tensor:
        """Turn a video into normalized latents, (mean - config.mean) / config.std; nothing is sampled.

        video: (B,3,T,H,W) in [-1,1], T = 4k+1, H and W multiples of 8. Returns float32 (B,16,k+1,H/8,W/8).
        Raises ValueError for any other shape or tile.
        """
        b, t, h, w = _checked("video", video, 3, tile)
        if t % 4 != 1 or h % 8 or w % 8:
            raise ValueError(f"video needs 4k+1 frames and sides in multiples of 8, got {t} frames of {h}x{w}: crop it")
        chunks = [1] + [4] * (t // 4)
        shape = (b, 2 * self.config.z_dim, len(chunks), h // 8, w // 8)
        moments = stream(self.encoder, video, chunks, shape, tile, progress)  # (B,3,T,H,W) -> (B,32,F,h,w)
        mu, _ = self.conv1(moments.to(self.conv1.weight.dtype)).float().chunk(2, dim=1)  # -> (B,16,F,h,w)
        mean, std = self.statistics(mu)
        return (mu - mean) / std

    def decode(self, latents: Tensor, *, tile: int | None = None, progress: Callable | None = None) -> Tensor:
        """Turn normalized latents into a video, one latent frame at a time.

        latents: (B,16,F,h,w). Returns float32 (B,3,4F-3,8h,8w), about [-1,1] but not clamped.
        Raises ValueError for any other shape or tile.
        """
        b, f, h, w = _checked("latents", latents, self.config.z_dim, tile)
        mean, std = self.statistics(latents)
        z = self.conv2((latents.float() * std + mean).to(self.conv2.weight.dtype))
        shape = (b, 3, 4 * f - 3, 8 * h, 8 * w)
        return stream(self.decoder, z, [1] * f, shape, tile, progress)  # (B,16,F,h,w) -> (B,3,T,H,W)

    def statistics(self, like: Tensor) -> Tensor:
        """Return mean and std of the latent channels, (2,16,1,1,1). No buffer, which would be in the state dict."""
        return torch.tensor([self.config.mean, self.config.std], device=like.device)[:, :, None, None, None]


def _checked(name: str, x: Tensor, channels: int, tile: int | None) -> tuple[int, int, int, int]:
    """Return (batch, frames, height, width) of a valid input; raises ValueError."""
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"{name} must be (batch, {channels}, frames, height, width), got {tuple(x.shape)}")
    if tile is not None and (tile < 32 or tile % 32):
        raise ValueError(f"tile must be a positive multiple of 32 pixels, or None for whole frames, got {tile}")
    return x.shape[0], *x.shape[2:]
