"""Clips of the tiny world that the studies change: at another speed or length, with a cut, behind an occluder."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.metrics.points import MakeClip
from wan_mini.tiny.world import FRAMES, WIDTH, Clip, make_clip

CUT = 17  # frames before a cut: five latent frames
OCCLUDER = slice(WIDTH // 2 - 20, WIDTH // 2 + 20)  # columns of pixels
GRAY = 128  # of the occluder: muted, as the world's backgrounds are


def frames_at(speed: float, count: int = FRAMES) -> list[int]:
    """Which of the world's frames are shown: at this speed, forth and back, so that there are always enough."""
    last = FRAMES - 1
    numbers = []
    for frame in range(count):
        position = int(speed * frame) % (2 * last)
        numbers.append(min(position, 2 * last - position))
    return numbers


def played(frames: Sequence[int]) -> MakeClip:
    """Clips that show these frames of the world's, in this order, with the truth about them."""

    def clip_of(seed: int, kind: str, split: str) -> Clip:
        return make_clip(seed, kind, split, frames)

    return clip_of


def with_cut(seed: int, kind: str, split: str) -> Clip:
    """A clip that cuts to another one before frame CUT; its truth, and what is asked for, is that of the first."""
    clip = make_clip(seed, kind, split)
    other = make_clip(seed + 1, kind, split)
    return replace(clip, frames=np.concatenate([clip.frames[:CUT], other.frames[CUT:]]))


def occluded(seed: int, kind: str, split: str) -> Clip:
    """A clip behind a gray bar in the middle; its truth is known there, too."""
    clip = make_clip(seed, kind, split)
    frames = clip.frames.copy()
    frames[:, :, OCCLUDER] = GRAY
    return replace(clip, frames=frames)
