"""A clip of the tiny world, a prompt that keeps nothing of it but the motion, and how well a video does both.

The clip is bundled as a file, like any other reference. Its seed makes it again, with the true tracks.
"""

from pathlib import Path

import numpy as np

from wan_mini.tiny.measure import label, read_scene, score
from wan_mini.tiny.world import Clip, Scene, make_clip, other_scene

CHECKPOINT = Path(__file__).parent / "checkpoint"
REFERENCE = Path(__file__).parent / "reference.webp"
SEED, KIND = 8, "single"  # of the reference, among the held-out clips


def reference_clip() -> Clip:
    """The bundled clip with its true tracks."""
    return make_clip(SEED, KIND, "held-out")


def target_scene() -> Scene:
    """What the default prompt, its caption, asks for: another shape in another color on another ground."""
    return other_scene(make_clip(SEED, KIND, "held-out", frames=[]), SEED)


def is_default(clip: np.ndarray, prompt: str) -> bool:
    """Whether a run is of the bundled clip, all of it, and of the default prompt, so that a verdict has a meaning."""
    truth = reference_clip().frames
    same = clip.shape == truth.shape and np.abs(clip.astype(int) - truth).mean() < 4  # levels: the file is compressed
    return same and prompt == target_scene().caption


def verdict(frames: np.ndarray) -> str:
    """One line on how far frames (33,128,192,3) uint8 follow the bundled clip and show the default prompt."""
    scene = target_scene()
    objects, _ = read_scene(frames, label(frames), scene)
    found = score(frames, reference_clip(), scene)
    seen = " and ".join(f"{color or 'no'} {shape or 'shape'}" for shape, color in objects)
    ground = "the right ground" if found["background_ok"] else "another ground"
    motion = f"correlation {found['correlation']:.2f} with the true path, {found['error_px']:.1f} px off"
    return f"{motion}, direction {found['direction']:.2f}; it shows a {seen} on {ground}"
