"""How well a DiT makes close-ups, whole pictures of one large object, which shapes are learned from."""

import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.metrics.rows import Row
from wan_mini.load import Wan
from wan_mini.tiny.training import fast_dit
from wan_mini.tiny.training.data import Encoder, crop_object
from wan_mini.tiny.training.probe import UNSEEN, decode_frames, held_out_scenes, sample, shares, shown, text_of
from wan_mini.tiny.training.vae import normal, psnr
from wan_mini.tiny.world import SHAPES, Clip, make_clip

# Close-ups of training pairs of shape and color; half as many of held-out pairs, and of objects with limbs.
SAMPLES = 48
SAMPLE_STEPS = 16
SMALL = (48, 64)  # height and width in pixels of a close-up at two thirds of its scale


def shrink(frames: np.ndarray) -> np.ndarray:
    """Close-ups (n,1,80,96,3) uint8 at two thirds of their scale, (n,1,48,64,3); four rows at each edge are cut."""
    pixels = torch.from_numpy(frames[:, 0, 4:-4]).movedim(-1, 1).float()  # (n,1,80,96,3) -> (n,3,72,96)
    small = F.interpolate(pixels, SMALL, mode="area").round().byte()
    return small.movedim(1, -1)[:, None].numpy()  # (n,3,48,64) -> (n,1,48,64,3)


class Judge:
    """Close-ups that no training draws, and how well a model makes and restores such."""

    def __init__(self, encode: Encoder, size: tuple[int, int], dtype: torch.dtype):
        self.size = size
        self.dtype = dtype
        self.scenes = [make_clip(UNSEEN + number, "single", frames=[16]) for number in range(SAMPLES)]
        self.scenes += held_out_scenes(SAMPLES // 2)
        self.scenes += [make_clip(UNSEEN + number, "articulated", frames=[16]) for number in range(SAMPLES // 2)]
        crops = [crop_object(clip, UNSEEN + number) for number, clip in enumerate(self.scenes[:SAMPLES])]
        self.latents = torch.from_numpy(encode(np.stack(crops))).float()  # (n,16,1,h,w)

    @torch.no_grad()
    def report(self, wan: Wan) -> tuple[Row, np.ndarray]:
        """What is measured, and all samples as one picture (rows,columns,3), eight in a row."""
        captions = [scene.caption for scene in self.scenes]
        videos = sample(wan, captions, 1, SAMPLE_STEPS, self.dtype, self.size)  # (n,1,H,W,3)
        attributes = [shown(video, scene) for video, scene in zip(videos, self.scenes, strict=True)]
        known = captions[:SAMPLES]
        wrong = [name_another_shape(scene) for scene in self.scenes[:SAMPLES]]
        figures: Row = {
            **shares(attributes[:SAMPLES]),
            "shape_held_out": shares(attributes[SAMPLES : SAMPLES + SAMPLES // 2])["shape_ok"],
            "limb_ok": shares(attributes[SAMPLES + SAMPLES // 2 :])["shape_ok"],  # and each its own color
            "wrong_shape": self.loss(wan, wrong) - self.loss(wan, known),
        }
        clean = decode_frames(wan, self.latents.to(wan.device), self.dtype)
        for sigma in (0.5, 0.7, 0.9):
            noisy, velocity = self.denoise(wan, known, sigma)
            restored = decode_frames(wan, noisy - sigma * velocity, self.dtype)
            figures[f"psnr_{10 * sigma:02.0f}"] = psnr(restored, clean)
        height, width = self.size
        tiles = videos[:, 0].reshape(-1, 8, height, width, 3)  # (n,1,H,W,3) -> (n/8,8,H,W,3)
        return figures, tiles.swapaxes(1, 2).reshape(-1, 8 * width, 3)  # -> (n/8,H,8,W,3) -> (nH/8,8W,3)

    def denoise(self, wan: Wan, captions: Sequence[str], sigma: float) -> tuple[Tensor, Tensor]:
        """The close-ups at a noise level, and their velocities with these captions, both (n,16,1,h,w)."""
        clean = self.latents.to(wan.device)
        noisy = (1 - sigma) * clean + sigma * normal(np.random.default_rng(0), clean)
        timestep = torch.full((len(clean),), 1000 * sigma)
        velocity, _ = fast_dit.velocity(wan.dit, noisy, timestep, text_of(wan, list(captions)), self.dtype)
        return noisy, velocity

    def loss(self, wan: Wan, captions: Sequence[str], sigma: float = 0.8) -> float:
        """Mean squared error of the velocities with these captions."""
        noisy, velocity = self.denoise(wan, captions, sigma)
        true = (noisy - self.latents.to(wan.device)) / sigma  # noise - clean
        return float(F.mse_loss(velocity, true))


def name_another_shape(scene: Clip) -> str:
    """A single object's caption with the next shape's word in the place of its own."""
    names = list(SHAPES)
    shape = scene.objects[0][0]
    other = SHAPES[names[(names.index(shape) + 1) % len(names)]].nouns[0]
    nouns = "|".join(SHAPES[shape].nouns)
    return re.sub(rf"\b({nouns})\b", other, scene.caption)
