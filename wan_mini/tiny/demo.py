"""The default run: a bundled clip, a prompt that keeps nothing of it but the motion, and how well a video does both.

The clip is a file, like any other reference. Its seed makes it again, with the true tracks.
"""

from pathlib import Path

import numpy as np

from wan_mini.tiny.world import Clip, Scene, classify_scene, label_pixels, make_clip, other_scene, score

CHECKPOINT = Path(__file__).parent / "checkpoint"
REFERENCE = Path(__file__).parent / "reference.webp"
SEED = 8  # of the reference, among the held-out clips
KIND = "single"


def reference_clip() -> Clip:
    """The bundled clip with its true tracks."""
    return make_clip(SEED, KIND, "held-out")


def target_scene() -> Scene:
    """What the default prompt, its caption, asks for: another shape in another color on another background."""
    return other_scene(make_clip(SEED, KIND, "held-out", frames=[]), SEED)


def is_default(clip: np.ndarray, prompt: str) -> bool:
    """Whether a run is of the bundled clip (33,128,192,3) uint8, and of the default prompt, so that it has a truth."""
    true = reference_clip().frames
    if clip.shape != true.shape or prompt != target_scene().caption:
        return False
    return bool(np.abs(clip.astype(int) - true).mean() < 4)  # levels: the file is compressed


def summary(frames: np.ndarray) -> str:
    """One line on how far frames (33,128,192,3) uint8 follow the bundled clip and show the default prompt."""
    scene = target_scene()
    scores = score(frames, reference_clip(), scene)
    objects, right = classify_scene(frames, label_pixels(frames), scene)
    shown = " and ".join(f"{color or 'no'} {shape or 'shape'}" for shape, color in objects)
    background = "the right background" if right["background_ok"] else "another background"
    motion = f"correlation {scores['correlation']:.2f} with the true path, {scores['error_px']:.1f} px error"
    return f"{motion}, direction {scores['direction']:.2f}; shows a {shown} on {background}"
