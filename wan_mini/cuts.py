"""Where a clip cuts to another scene, and its parts: motion is followed within one scene, so a reference is one."""

from itertools import pairwise

import numpy as np

BINS = 8  # of a color histogram, in each of R, G and B
LEAST = 0.06  # share of the pixels whose color must change at a cut
OUTSTANDING = 5.0  # times as many as between most other frames


def histogram(frame: np.ndarray) -> np.ndarray:
    """Share of the pixels of a frame (H,W,3) uint8 in each bin of colors, (BINS^3,): motion hardly changes it."""
    bins = frame.astype(int) * BINS // 256  # (H,W,3)
    numbers = (bins[..., 0] * BINS + bins[..., 1]) * BINS + bins[..., 2]  # (H,W)
    return np.bincount(numbers.flatten(), minlength=BINS**3) / numbers.size


def find_cuts(frames: np.ndarray) -> list[int]:
    """The frames (T,H,W,3) uint8 before which there is a cut, in order: where colors change at once.

    A fade, and a cut between scenes of the same colors, is not seen.
    """
    histograms = [histogram(frame) for frame in frames]
    changes = []
    for before, after in pairwise(histograms):
        changes.append(float(np.abs(after - before).sum() / 2))  # share of the pixels that change their bin, at least
    usual = float(np.quantile(changes, 0.75)) if changes else 0.0  # no median: a clip of a low rate repeats frames
    cuts = []
    for number, change in enumerate(changes, start=1):
        if change >= max(LEAST, OUTSTANDING * usual):
            cuts.append(number)
    return cuts


def split_at_cuts(frames: np.ndarray) -> list[np.ndarray]:
    """The scenes of a clip (T,H,W,3) uint8, in order, each cut to the largest 4k+1 frames that it has."""
    scenes = []
    for scene in np.split(frames, find_cuts(frames)):
        whole = (len(scene) - 1) // 4 * 4 + 1
        scenes.append(scene[:whole])
    return scenes
