"""The sizes of every part of Wan 2.1 (three frozen dataclasses and presets), and the geometry of its latents.

This is the only file that knows how pixels, latents and tokens relate:

    video      T frames     height       width          T = 4k + 1
    latents    F = k + 1    height / 8   width / 8      the first frame alone, then 4 frames to a latent frame
    tokens     F            height / 16  width / 16     one token covers 1 x 2 x 2 latents

Source: Wan technical report (arXiv 2503.20314), section 4.1 (VAE) and 4.2 (patches).
"""

from dataclasses import dataclass

from wan_mini.errors import UserError, check_positive, check_range

TIME_STRIDE = 4  # video frames to a latent frame, but for the first
SPATIAL_STRIDE = 8  # pixels to a latent, along each side
PATCH = (1, 2, 2)  # latents to a token: frames, rows, columns
TOKEN_SIZE = SPATIAL_STRIDE * PATCH[1]  # pixels to a token, along each side: 16
LATENT_CHANNELS = 16
MAX_SIDE = 8192  # pixels of a clip
MAX_TOKENS = 2**20  # of a clip; 81 frames of 1280x720 have 75,600
MAX_FPS = 1000  # frames a second; a WebP counts whole milliseconds

# Statistics of the official VAE's 16 latent channels (Wan 2.1, wan/modules/vae.py): latent = (mu - mean) / std.
# fmt: off
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


def valid_frames(frames: int, available: int | None = None) -> int:
    """Return the 4k+1 nearest to `frames` (79 -> 77, 80 -> 81) and not above `available`, both in video frames."""
    nearest = frames // TIME_STRIDE * TIME_STRIDE + 1
    if available is None:
        return nearest
    largest = (available - 1) // TIME_STRIDE * TIME_STRIDE + 1
    return min(nearest, largest)


def valid_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) in pixels, cut down to whole tokens (multiples of 16)."""
    height, width = size
    return height // TOKEN_SIZE * TOKEN_SIZE, width // TOKEN_SIZE * TOKEN_SIZE


def latent_frames(frames: int) -> int:
    """Return the number of latent frames F of a video of T = 4k+1 frames: k + 1.

    Raises UserError for another number of frames.
    """
    if frames < 1 or frames % TIME_STRIDE != 1:
        nearest = max(1, valid_frames(frames))
        raise UserError(f"frames must be {TIME_STRIDE}k+1, got {frames}: try {nearest}")
    return (frames - 1) // TIME_STRIDE + 1


def frames_of(latent_frames: int) -> int:
    """Return the number of video frames T = 4F - 3 of F latent frames, the inverse of latent_frames."""
    return TIME_STRIDE * (latent_frames - 1) + 1


def latent_shape(
    frames: int, height: int, width: int, channels: int = LATENT_CHANNELS
) -> tuple[int, int, int, int, int]:
    """Return the shape (1, C, F, h, w) of the latents of a video of `frames` pictures of height x width pixels.

    frames is 4k+1; height and width are multiples of 8. Raises UserError for other sizes.
    """
    if min(height, width) < 1 or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
        raise UserError(f"height and width must be multiples of {SPATIAL_STRIDE}, got {height}x{width}: crop the video")
    return 1, channels, latent_frames(frames), height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


def token_grid(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the token grid (F, H, W) of a video of `frames` pictures of height x width pixels.

    frames is 4k+1; height and width are multiples of 16. Raises UserError for other sizes.
    """
    if min(height, width) < 1 or valid_size((height, width)) != (height, width):
        raise UserError(f"height and width must be multiples of {TOKEN_SIZE}, got {height}x{width}: crop the video")
    return latent_frames(frames), height // TOKEN_SIZE, width // TOKEN_SIZE


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the diffusion transformer; `dim` is C, `dim / num_heads` is D.

    Raises UserError if dim does not split into heads of even width.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256  # width of the sinusoidal timestep embedding
    text_dim: int = 4096  # width of the text encoder's output
    text_len: int = 512  # prompts are zero-padded to this many tokens
    in_dim: int = LATENT_CHANNELS
    out_dim: int = LATENT_CHANNELS
    patch_size: tuple[int, int, int] = PATCH

    def __post_init__(self) -> None:
        for name in ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "in_dim", "out_dim"):
            check_range(name, getattr(self, name), 1)
        if self.freq_dim < 2 or self.freq_dim % 2:
            raise UserError(f"freq_dim must be even (sines and cosines) and at least 2, got {self.freq_dim}")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UserError(f"dim must split into num_heads heads of even width, got {self.dim} / {self.num_heads}")


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the causal video VAE and the statistics that normalize its latents.

    Raises UserError if there is not one mean and one std for each latent channel, or not one level more than there
    are halvings of height and width.
    """

    dim: int = 96
    z_dim: int = LATENT_CHANNELS
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    mean: tuple[float, ...] = WAN_MEAN
    std: tuple[float, ...] = WAN_STD

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.z_dim:
            raise UserError(f"mean and std need z_dim={self.z_dim} numbers, got {len(self.mean)} and {len(self.std)}")
        check_range("mean", self.mean, -1e6, 1e6)
        check_range("std", self.std, 1e-6, 1e6)
        if 2 ** (len(self.dim_mult) - 1) != SPATIAL_STRIDE:
            raise UserError(f"dim_mult must have 4 levels (3 of them halve space), got {self.dim_mult}")


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of the UMT5 text encoder. Raises UserError if dim_attn does not split into heads."""

    vocab: int
    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32  # relative-position buckets, for distances up to 128

    def __post_init__(self) -> None:
        check_range("num_buckets", self.num_buckets, 4)  # two directions, each of two halves
        if self.dim_attn % self.num_heads:
            raise UserError(f"dim_attn must split into num_heads heads, got {self.dim_attn} / {self.num_heads}")


T2V_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
T2V_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
WAN_VAE = VAEConfig()
UMT5_XXL = UMT5Config(vocab=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24)

# The same architecture small enough for a laptop's CPU and a notebook.
TINY = DiTConfig(dim=192, ffn_dim=768, num_heads=3, num_layers=6, text_dim=64, text_len=64)
TINY_VAE = VAEConfig(dim=16, num_res_blocks=1)
TINY_UMT5 = UMT5Config(vocab=512, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2)


@dataclass(frozen=True)
class ClipConfig:
    """Size and rate of a clip, reference and result alike. Defaults: Wan 2.1's, and FastVMT Sec. 4.1."""

    height: int = 480  # pixels, multiple of 16
    width: int = 832
    frames: int = 81  # 4k+1; motion needs at least 5
    fps: float = 16.0  # frames a second; a reference is resampled to it

    def __post_init__(self) -> None:
        check_range("height", self.height, 16, MAX_SIDE)
        check_range("width", self.width, 16, MAX_SIDE)
        check_range("frames", self.frames, 1, MAX_TOKENS)
        check_positive("fps", self.fps, MAX_FPS)
        tokens = (self.frames // TIME_STRIDE + 1) * (self.height // TOKEN_SIZE) * (self.width // TOKEN_SIZE)
        if tokens > MAX_TOKENS:
            got = f"{self.frames} frames of {self.width}x{self.height} make {tokens} tokens"
            raise UserError(f"{got}, more than any device holds ({MAX_TOKENS}): fewer frames, or a smaller size")
