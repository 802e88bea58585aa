"""Stage vae: autoencoder of crops, then of whole frames, with noise on the latents."""

import json
from dataclasses import asdict, replace

import numpy as np
import torch
from numpy.random import Generator
from safetensors.torch import save_file
from torch import Tensor, nn

from wan_mini.config import TINY_VAE, VAEConfig, latent_shape
from wan_mini.tiny.training import fast_vae
from wan_mini.tiny.training.data import LENGTH, Pool, Sampler, workers
from wan_mini.tiny.training.recipe import VAE, Batch, Recipe
from wan_mini.tiny.training.record import record
from wan_mini.tiny.training.trainer import Figures, Items, Job, Trainer
from wan_mini.tiny.world import FRAMES, KINDS, WIDTH, make_clip
from wan_mini.vae import AttentionBlock, CausalConv3d, ResidualBlock, WanVAE
from wan_mini.video import to_tensor, to_uint8

VAE_FILE = "Wan2.1_VAE.safetensors"  # as save_wan names it
NOISY = 0.3  # standard deviations of noise on the latents that the VAE is judged with


def normal(rng: Generator, like: Tensor) -> Tensor:
    """Standard normal noise shaped like a tensor, drawn on its device."""
    generator = torch.Generator(like.device).manual_seed(int(rng.integers(2**32)))
    return torch.randn(like.shape, generator=generator, device=like.device)


def to_videos(frames: np.ndarray, device: torch.device) -> Tensor:
    """Clips (B,T,H,W,3) uint8 -> videos (B,3,T,H,W) in [-1,1]."""
    return torch.cat([to_tensor(clip) for clip in frames]).to(device)


def crop(frames: np.ndarray, batch: Batch, rng: Generator) -> np.ndarray:
    """A random piece of frames (T,H,W,3), as large as the batch has them: of 3, the one in which most changes."""
    size = (batch.frames, batch.height or frames.shape[1], batch.width or frames.shape[2])
    room = np.subtract(frames.shape[:3], size) + 1
    pieces = []
    changes = []
    for _ in range(3):
        t, y, x = rng.integers(room)
        piece = frames[t : t + size[0], y : y + size[1], x : x + size[2]]
        pieces.append(piece)
        changes.append(np.abs(piece[-1].astype(np.int16) - piece[0]).sum())
    return pieces[int(np.argmax(changes))]


def vae_loss(vae: WanVAE, video: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of the reconstruction of a video (B,3,T,H,W) from its latents plus noise: L1, and five times L2.

    The noise (B,16,F,h,w), in units of each channel's own standard deviation, makes the decoder forgive a DiT's errors
    and replaces the usual KL divergence: information that noise would drown is not stored in fine differences.
    """
    latents = fast_vae.encode(vae, video, dtype)
    latents = latents + noise * latents.detach().std((0, 2, 3, 4), keepdim=True)
    error = fast_vae.decode(vae, latents, dtype) - video
    return error.abs().mean() + 5 * error.square().mean()


@torch.no_grad()
def initialize(vae: WanVAE) -> WanVAE:
    """Begin as a nearly linear code of single pictures, through which signals and gradients pass at full strength.

    Orthogonal weights keep the signal's size. Residual branches begin at zero (arXiv 1901.09321). Nothing looks at the
    past, and time is only thinned out and repeated, so what pictures teach is a good start for clips.
    """
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.orthogonal_(layer.weight)
        if isinstance(layer, CausalConv3d):
            _ignore_past(layer)
    for layer in vae.modules():
        if isinstance(layer, ResidualBlock):
            layer.residual[6].weight.zero_()  # type: ignore[operator]
        if isinstance(layer, AttentionBlock):
            layer.proj.weight.zero_()
    return vae


def _ignore_past(layer: CausalConv3d) -> None:
    """Let only the last tap of a causal convolution count."""
    layer.weight[:, :, :-1] = 0
    last = layer.weight[:, :, -1]  # (C',C,kh,kw)
    if layer.kernel_size[1] > 1:
        last.copy_(nn.init.orthogonal_(torch.empty(last.shape)))
        return
    # Halves or doubles time: keep the last frame of two, or make two of one.
    copies = torch.eye(layer.in_channels).repeat(layer.out_channels // layer.in_channels, 1)
    last[:, :, 0, 0] = copies  # (C or 2C, C)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


@torch.no_grad()
def restore(vae: WanVAE, frames: np.ndarray, dtype: torch.dtype, noise: float = 0.0) -> np.ndarray:
    """Clips (n,T,H,W,3) uint8 through encoder and decoder, with noise on the latents in standard deviations."""
    restored = []
    for number in range(len(frames)):
        latents = fast_vae.encode(vae, to_videos(frames[number : number + 1], vae.conv1.weight.device), dtype)
        sizes = latents.std((0, 2, 3, 4), keepdim=True)
        latents = latents + noise * sizes * normal(np.random.default_rng(number), latents)
        restored.append(to_uint8(fast_vae.decode(vae, latents, dtype)))
    return np.stack(restored)


def psnr(frames: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 frames."""
    return float(-10 * np.log10(np.square(frames / 255.0 - target / 255.0).mean()))


def held_out_clips(count: int, frames: int = FRAMES) -> np.ndarray:
    """Clips of the held-out split, one kind after the other: (count,T,H,W,3) uint8."""
    clips = [make_clip(seed, KINDS[seed % len(KINDS)], "held-out", range(frames)) for seed in range(count)]
    return np.stack([clip.frames for clip in clips])


def no_encoder() -> None:
    """Workers of this stage make pixels."""


def train_vae(job: Job, recipe: Recipe = VAE, config: VAEConfig = TINY_VAE) -> None:
    """Train the VAE, measure its latents' statistics and its quality, write it to the checkpoint folder."""
    plain = replace(config, mean=(0.0,) * config.z_dim, std=(1.0,) * config.z_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        vae = initialize(WanVAE(plain))
    sampler = Sampler(Pool(job.work / "data", None), recipe.streams)
    trainer = Trainer("vae", recipe, job, vae, sampler)
    clips = held_out_clips(recipe.samples, LENGTH)

    def loss_of(vae: WanVAE, items: Items, batch: Batch, rng: Generator) -> tuple[Tensor, Figures]:
        video = to_videos(np.stack([crop(item["frames"], batch, rng) for item in items]), job.device)
        shape = latent_shape(batch.frames, video.shape[3], video.shape[4], config.z_dim)
        sizes = torch.tensor(rng.uniform(0, recipe.noise, (len(video), 1, 1, 1, 1)), dtype=torch.float32)
        noise = normal(rng, torch.empty(len(video), *shape[1:], device=job.device))
        return vae_loss(vae, video, sizes.to(job.device) * noise, job.dtype), {}

    def draw_samples() -> np.ndarray:
        restored = restore(trainer.ema, clips, job.dtype)
        noisy = restore(trainer.ema, clips, job.dtype, NOISY)
        print(f"held out: {psnr(restored, clips):.2f} dB, with {NOISY} noise {psnr(noisy, clips):.2f} dB", flush=True)
        rows = np.stack([clips, restored, noisy], axis=1)[:, :, ::8]  # three (n,17,H,W,3) -> (n,3,3,H,W,3)
        return rows.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3 * WIDTH, 3)  # -> (3nH,3W,3)

    with workers(job.workers, job.work / "data", recipe.streams, no_encoder):
        trainer.run(loss_of, draw_samples)
    record(trainer, store_vae(trainer.ema, job, recipe, config))


@torch.no_grad()
def store_vae(vae: WanVAE, job: Job, recipe: Recipe, config: VAEConfig) -> Figures:
    """Round the weights to float16, measure the latents of training clips, and write the file; PSNR in dB."""
    vae = vae.half().float()
    latents = []
    for seed in range(recipe.statistics):
        video = to_videos(make_clip(seed).frames[None], job.device)
        latents.append(fast_vae.encode(vae, video, job.dtype).cpu().numpy())
    stacked = np.concatenate(latents)  # (n,16,F,h,w)
    mean = stacked.mean((0, 2, 3, 4)).tolist()  # (16,)
    std = stacked.std((0, 2, 3, 4)).tolist()
    vae.config = replace(config, mean=tuple(mean), std=tuple(std))
    clips = held_out_clips(3 * recipe.samples)
    clean = psnr(restore(vae, clips, torch.float32), clips)
    noisy = psnr(restore(vae, clips, torch.float32, NOISY), clips)
    job.folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.cpu().half().contiguous() for key, tensor in vae.state_dict().items()}
    save_file(tensors, job.folder / VAE_FILE, {"config": json.dumps(asdict(vae.config))})
    name = f"PSNR of {len(clips)} held-out clips, dB"
    return {name: round(clean, 2), f"{name}, with {NOISY} of noise on the latents": round(noisy, 2)}
