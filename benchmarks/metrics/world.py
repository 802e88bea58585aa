"""Measures of clips of the tiny world that need no weights: what each frame shows, and how it goes on to the next."""

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.metrics.features import consistency, smoothness, unit
from wan_mini.tiny.world import COLORS, LIMBS, SHAPES, Clip, Objects, Scene, classify_scene, label_pixels
from wan_mini.tiny.world.motions import Pose
from wan_mini.tiny.world.tracker import fill_missing, predicted_tracks, track_camera, true_tracks

BINS = 8  # of a color histogram, in each of R, G and B


def shown_objects(frames: np.ndarray, labels: np.ndarray, scene: Scene) -> list[Objects]:
    """The objects that each frame (T,H,W,3) alone shows, sorted, by the attribute classifier."""
    shown = []
    for index in range(len(frames)):
        one = slice(index, index + 1)
        objects, _ = classify_scene(frames[one], labels[one], scene)
        shown.append(tuple(sorted(objects)))
    return shown


def subject_consistency(shown: list[Objects]) -> float:
    """Share of frames that show the clip's most frequent set of objects: what turns into another object costs.

    1 also where all frames show the same wrong object; whether it is the right one is `color_ok` and `shape_ok`.
    """
    (_, count), *_ = Counter(shown).most_common(1)
    return count / len(shown)


def temporal_consistency(frames: np.ndarray, labels: np.ndarray, shown: list[Objects]) -> float:
    """`consistency` of features that the world knows: which shapes in which colors, and the background's colors."""
    names = [*SHAPES, *LIMBS, ""]
    colors = [*COLORS, ""]
    features = []
    for frame, label, objects in zip(frames, labels, shown, strict=True):
        table = np.zeros((len(names), len(colors)))
        for shape, color in objects:
            table[names.index(shape), colors.index(color)] = 1
        histogram = np.histogramdd(frame[label < 0], bins=BINS, range=[(0, 256)] * 3)[0].flatten()
        features.append(np.concatenate([unit(table.flatten()), unit(histogram)]))
    return consistency(np.array(features))


def background_consistency(frames: np.ndarray, labels: np.ndarray, camera: Pose) -> float:
    """1 minus the mean difference of the background from that of frame 0, moved by the camera, as a share of 255.

    Over pixels that are background in both frames; camera: as from track_camera.
    """
    height, width = labels.shape[1:]
    z = np.arange(width) + 1j * np.arange(height)[:, None]  # (H,W)
    origin = camera.at(np.arange(len(frames))[:, None, None]).invert(z)  # (T,H,W): where in frame 0
    grid = np.stack([2 * origin.real / (width - 1) - 1, 2 * origin.imag / (height - 1) - 1], axis=-1)
    first = np.concatenate([frames[0], (labels[0] < 0)[..., None]], axis=-1)  # (H,W,4)
    picture = torch.from_numpy(first).double().permute(2, 0, 1).expand(len(frames), -1, -1, -1)  # -> (T,4,H,W)
    warped = F.grid_sample(picture, torch.from_numpy(grid), align_corners=True).movedim(1, -1).numpy()  # (T,H,W,4)
    both = (labels < 0) & (warped[..., 3] > 0.99)
    if not both[1:].any():
        return float("nan")
    difference = np.abs(frames - warped[..., :3]).mean(-1)  # (T,H,W)
    return float(1 - difference[1:][both[1:]].mean() / 255)


def jerk(tracks: np.ndarray) -> float:
    """Mean length of second differences of paths (points,T), in pixels: 0 along a line at constant speed."""
    return float(np.abs(np.diff(tracks, n=2)).mean())


def dynamic_degree(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean length of the predicted steps over that of the true ones, (points,T) each: 1 if as lively, 0 if frozen."""
    return float(np.abs(np.diff(predicted)).mean() / np.abs(np.diff(true)).mean())


def quality(frames: np.ndarray, clip: Clip, scene: Scene) -> dict[str, float]:
    """Every measure of this file for frames (T,H,W,3) that should show `scene` and move as `clip`, by its name."""
    labels = label_pixels(frames)
    shown = shown_objects(frames, labels, scene)
    objects, _ = classify_scene(frames, labels, scene)
    true, owners = true_tracks(clip)
    lost_and_seen = predicted_tracks(frames, labels, objects[: len(clip.objects)], true[owners == -1, 0])
    predicted = fill_missing(lost_and_seen)
    return {
        "subject": subject_consistency(shown),
        "temporal": temporal_consistency(frames, labels, shown),
        "background": background_consistency(frames, labels, track_camera(frames, labels)),
        "smoothness": smoothness(frames),
        "jerk": jerk(predicted) - jerk(true),
        "dynamic": dynamic_degree(predicted, true),
    }
