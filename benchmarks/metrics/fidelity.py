"""Motion fidelity in its published forms, and the level that each reaches by chance.

Paths are (points,T), column + i row in pixels, as in wan_mini.tiny.world, whose `fidelity_published` (SMM's script) and
`fidelity` (mended) are reused here.
"""

from collections.abc import Iterator

import numpy as np

from wan_mini.tiny.world import fidelity, fidelity_published, true_tracks
from wan_mini.tiny.world.metrics import error_px
from wan_mini.tiny.world.render import Clip, make_clip

LIMIT = 2**22  # numbers in the cosines that are held at once
SEED_STEP = 1_000_003  # from a clip's seed to that of an unrelated one


def best_match_fidelity(predicted: np.ndarray, true: np.ndarray, *, both: bool = False) -> float:
    """SMM's published formula for many tracks, in chunks: the same number as fidelity_published, less memory.

    both=True: the formula of the paper, the mean of both directions, without the script's identity.
    """
    a = _directions(predicted)
    b = _directions(true)
    best_of_predicted = np.full(len(a), -np.inf)
    best_of_true = np.full(len(b), -np.inf)
    rows = max(1, LIMIT // len(b))
    for start in range(0, len(a), rows):
        chunk = a[start : start + rows]
        cosines = (chunk @ b.conj().T).real / a.shape[1]  # (rows,T-1) x (T-1,points) -> (rows,points)
        if not both:
            cosines = cosines - np.eye(len(chunk), len(b), start)
        best_of_predicted[start : start + rows] = cosines.max(1)
        best_of_true = np.maximum(best_of_true, cosines.max(0))
    if both:
        return float((best_of_predicted.mean() + best_of_true.mean()) / 2)
    return float(best_of_predicted.mean())


def _directions(tracks: np.ndarray) -> np.ndarray:
    """Steps of length 1, (points,T) -> (points,T-1); NaN where a track rests."""
    steps = np.diff(tracks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return steps / np.abs(steps)


def det_fidelity(predicted: np.ndarray, true: np.ndarray, size: tuple[int, int]) -> float:
    """DeT's hybrid: half of it the best cosine with the start as a first step, half 1 / (1 + mean distance).

    size: height and width in pixels, by which positions are divided. The distance is the mean over all pairs of frames
    of all pairs of matched tracks, which DeT calls Frechet distance, though it is none. NaN if a track rests.
    """
    height, width = size
    a = predicted.real / width + 1j * predicted.imag / height
    b = true.real / width + 1j * true.imag / height
    one = _directions(np.concatenate([np.zeros((len(a), 1)), a], axis=1))  # (points,T): the start, then the steps
    other = _directions(np.concatenate([np.zeros((len(b), 1)), b], axis=1))
    cosines = (one @ other.conj().T).real / one.shape[1]  # (predicted,true)
    partner = b[cosines.argmax(1)]  # (predicted,T)
    distance = np.abs(a[:, :, None] - partner[:, None, :]).mean((1, 2))  # (predicted,T,T) -> (predicted,)
    return float((cosines.max(1) + 1 / (1 + distance)).mean() / 2)


def jitter_tracks(points: int, frames: int, seed: int) -> np.ndarray:
    """Tracks that know nothing: independent Gaussian steps of a pixel or so, (points,T)."""
    steps = np.random.default_rng(seed).normal(size=(2, points, frames))
    return np.cumsum(steps[0] + 1j * steps[1], axis=1)


def straight_tracks(points: int, frames: int, seed: int) -> np.ndarray:
    """Tracks in constant random directions, one pixel a frame, (points,T)."""
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, size=(points, 1))
    return np.exp(1j * angles) * np.arange(frames)


def unrelated_clip(clip: Clip, seed: int) -> Clip:
    """Another clip of the same kind and split."""
    return make_clip(seed + SEED_STEP, clip.kind, clip.split)


def chance_levels(clip: Clip, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """What the fidelities of a clip's true tracks are with tracks that have nothing to do with it, by name."""
    true, _ = true_tracks(clip)
    other, _ = true_tracks(unrelated_clip(clip, seed))
    jitter = true[:, :1] + jitter_tracks(len(true), true.shape[1], seed)
    for name, tracks in (("chance: tracks of another clip", other), ("chance: jitter", jitter)):
        levels = {"fidelity": fidelity(tracks, true)}
        if len(tracks) == len(true):  # the script subtracts the identity, so it needs as many
            levels["published"] = fidelity_published(tracks, true)
            levels["error_px"] = float(error_px(tracks, true).mean())
        yield name, levels
