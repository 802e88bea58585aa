"""How near a clip's motion is to the true one: correlation, error, direction, motion fidelity, and `score` for all.

Paths are (points,T), column + i row in pixels, without NaN; predicted ones come first, true ones second.
"""

from itertools import permutations

import numpy as np

from wan_mini.tiny.world.classifier import classify_scene, label_pixels
from wan_mini.tiny.world.render import Clip
from wan_mini.tiny.world.scenes import Scene
from wan_mini.tiny.world.tracker import fill_missing, predicted_tracks, true_tracks

MIN_RANGE = 4.0  # pixels, a quarter of a token: a path is judged along an axis if its range there is at least this
MIN_STEP = 1.0  # pixels a frame: a step has a direction if it is at least this long
JITTER = 0.1  # pixels a frame: a step shorter than this is no motion


def correlation(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pearson correlation of the paths, along columns and along rows, averaged over the axes that truly move.

    In [-1, 1], (points,). An axis moves if the true path's range is MIN_RANGE or more; NaN if none does, 0 if the
    predicted path stands still. Neither position nor size of a motion matters here: `error_px` sees those.
    """
    true_axes = np.stack([true.real, true.imag])  # (2,points,T)
    a = _standardize(np.stack([predicted.real, predicted.imag]))
    b = _standardize(true_axes)
    moves = np.ptp(true_axes, axis=-1) >= MIN_RANGE
    return _mean_where((a * b).mean(-1), moves, axis=0)  # (2,points) -> (points,)


def _standardize(paths: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 over time; that of a path at rest stays small."""
    centered = paths - paths.mean(-1, keepdims=True)
    deviation = np.sqrt(np.square(centered).mean(-1, keepdims=True))
    return centered / deviation.clip(JITTER)


def error_px(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Mean distance in pixels, (points,). No offset is taken out: where a motion happens is part of it."""
    return np.abs(predicted - true).mean(-1)


def direction(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Mean cosine between the steps of predicted and true path, in [-1, 1], (points,).

    Over steps whose true length is MIN_STEP or more; NaN if there are none. A point that does not move counts as 0.
    """
    a = np.diff(predicted)
    b = np.diff(true)
    cosines = (_unit(a) * _unit(b).conj()).real
    return _mean_where(cosines, np.abs(b) >= MIN_STEP, axis=1)


def fidelity_published(predicted: np.ndarray, true: np.ndarray) -> float:
    """Motion fidelity as the script of SMM has it (Yatim et al., arXiv 2311.17009, Sec. 5.1), faults and all.

    Cosines of steps, averaged over time; less the identity; the best match of each predicted track, averaged. So a
    track is matched with any but its own, and a step of length 0 makes the whole NaN.
    """
    a = np.diff(predicted)
    b = np.diff(true)
    with np.errstate(invalid="ignore", divide="ignore"):
        a = a / np.abs(a)
        b = b / np.abs(b)
    similarity = (a[:, None] * b.conj()).real.mean(-1)  # (points,1,T-1), (points,T-1) -> (points,points)
    return float((similarity - np.eye(len(similarity))).max(1).mean())


def fidelity(predicted: np.ndarray, true: np.ndarray) -> float:
    """Motion fidelity without these faults, in [-1, 1]: best matches both ways, over the steps and tracks that move.

    A track moves if one axis's range is MIN_RANGE or more, a step if it is longer than JITTER. NaN if no true track
    moves, 0 if no predicted one does.
    """
    a = _moving_steps(predicted)
    b = _moving_steps(true)
    if not len(b):
        return float("nan")
    if not len(a):
        return 0.0
    similarity = (a @ b.conj().T).real  # (predicted,true)
    return float((similarity.max(0).mean() + similarity.max(1).mean()) / 2)


def _moving_steps(tracks: np.ndarray) -> np.ndarray:
    """Directions of the steps of the tracks that move, scaled so that each track's product with itself is 1."""
    extent = np.maximum(np.ptp(tracks.real, axis=-1), np.ptp(tracks.imag, axis=-1))
    steps = _unit(np.diff(tracks[extent >= MIN_RANGE]))
    moving = (np.abs(steps) ** 2).sum(1, keepdims=True)  # how many steps
    return steps / np.sqrt(moving).clip(1)


def _unit(steps: np.ndarray) -> np.ndarray:
    """Steps of length 1 in the same direction, or 0 for those that are no motion."""
    length = np.abs(steps)
    return np.where(length > JITTER, steps / length.clip(JITTER), 0)


def _mean_where(values: np.ndarray, counted: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the values that are counted, NaN where none is."""
    count = counted.sum(axis)
    return np.where(count > 0, (values * counted).sum(axis) / count.clip(1), np.nan)


def score(frames: np.ndarray, clip: Clip, scene: Scene) -> dict[str, float]:
    """How far frames (T,H,W,3) uint8 show the scene, and move as the clip does: every measure by its name.

    Where there are several objects, a prompt does not say which of them moves how, so that they are paired with the
    clip's at the least error.
    """
    labels = label_pixels(frames)
    objects, right = classify_scene(frames, labels, scene)
    true, owners = true_tracks(clip)
    tracks = predicted_tracks(frames, labels, objects[: len(clip.objects)], true[owners == -1, 0])
    predicted = fill_missing(tracks)
    if clip.kind == "several":
        orders = permutations(range(len(predicted)))
        predicted = min((predicted[list(order)] for order in orders), key=lambda paths: error_px(paths, true).mean())
    clip_colors = {color for _, color in clip.objects}
    return {
        "correlation": _mean_over_owners(correlation(predicted, true), owners),
        "error_px": _mean_over_owners(error_px(predicted, true), owners),
        "direction": _mean_over_owners(direction(predicted, true), owners),
        "fidelity": fidelity(predicted, true),
        "published": fidelity_published(predicted, true),
        **right,
        "leak": any(color in clip_colors for _, color in objects),
    }


def _mean_over_owners(values: np.ndarray, owners: np.ndarray) -> float:
    """Mean of each owner's mean over its points (points,): all of the background weighs as much as one object."""
    means = []
    for owner in np.unique(owners):
        known = values[(owners == owner) & ~np.isnan(values)]
        if len(known):
            means.append(known.mean())
    return float(np.mean(means)) if means else float("nan")
