"""The sizes of every part of Wan 2.1: three frozen dataclasses, with the original's field names, and the presets."""

from dataclasses import dataclass

from wan_mini.errors import check_positive, check_range

# Statistics of the official VAE's 16 latent channels (Wan 2.1, wan/modules/vae.py): latent = (mu - mean) / std.
# fmt: off
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the diffusion transformer; `dim` is C, `dim / num_heads` is D."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256  # width of the sinusoidal timestep embedding
    text_dim: int = 4096  # width of the text encoder's output
    text_len: int = 512  # prompts are zero-padded to this many tokens
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim must split into num_heads heads of even width, got {self.dim} / {self.num_heads}")


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the causal video VAE and the statistics that normalize its latents."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    mean: tuple[float, ...] = WAN_MEAN
    std: tuple[float, ...] = WAN_STD

    def __post_init__(self):
        if not len(self.mean) == len(self.std) == self.z_dim:
            raise ValueError(f"mean and std need z_dim={self.z_dim} numbers, got {len(self.mean)} and {len(self.std)}")


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of the UMT5 text encoder."""

    vocab: int
    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32  # relative-position buckets, for distances up to 128


T2V_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
T2V_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
WAN_VAE = VAEConfig()
UMT5_XXL = UMT5Config(vocab=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24)

# The same architecture small enough for a laptop's CPU and a notebook.
TINY = DiTConfig(dim=192, ffn_dim=768, num_heads=4, num_layers=6, text_dim=64, text_len=64)
TINY_VAE = VAEConfig(dim=16, num_res_blocks=1)
TINY_UMT5 = UMT5Config(vocab=512, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2)


def latent_shape(frames: int, height: int, width: int, channels: int = 16) -> tuple[int, int, int, int, int]:
    """(1, C, F, h, w) of the latents of a clip."""
    return 1, channels, (frames - 1) // 4 + 1, height // 8, width // 8


def token_grid(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(F, H, W) of the tokens of a clip."""
    return (frames - 1) // 4 + 1, height // 16, width // 16


@dataclass(frozen=True)
class ClipConfig:
    """Size and rate of a clip, reference and result alike. Defaults: Wan 2.1's, and FastVMT Sec. 4.1."""

    height: int = 480  # pixels, multiple of 16
    width: int = 832
    frames: int = 81  # 4k+1; motion needs at least 5
    fps: float = 16.0  # frames a second; a reference is resampled to it

    def __post_init__(self) -> None:
        check_range("height", self.height, 16)
        check_range("width", self.width, 16)
        check_range("frames", self.frames, 1)
        check_positive("fps", self.fps)
