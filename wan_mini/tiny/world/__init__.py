"""A small world of colored shapes: seeded, captioned clips whose true trajectories are known exactly.

    clip = make_clip(8, "single", "held-out")            # clip.frames (33,128,192,3), clip.caption, clip.tracks
    scores = score(frames, clip, other_scene(clip, 8))   # how well other frames do the clip's motion

constants.py holds the numbers, shapes.py, scenes.py and motions.py what is shown and how it moves, render.py draws it,
tracks.py knows the truth. classifier.py and tracker.py read it off pixels again, metrics.py compares.
"""

from wan_mini.tiny.world.classifier import classify_scene, label_pixels
from wan_mini.tiny.world.constants import FPS, FRAMES, HEIGHT, KINDS, SHADE, SPLITS, TOP_SPEED, VIVID, WIDTH
from wan_mini.tiny.world.metrics import correlation, direction, error_px, fidelity, fidelity_published, score
from wan_mini.tiny.world.motions import MOTIONS, Motion, Pose, ScenePlan, Sprite, plan_clip
from wan_mini.tiny.world.render import Clip, make_clip, other_scene
from wan_mini.tiny.world.scenes import Objects, Scene
from wan_mini.tiny.world.shapes import BACKGROUNDS, BAR, COLORS, HELD_OUT, LIMBS, SHAPES, Background, Shape
from wan_mini.tiny.world.tracker import fill_missing, predicted_tracks, true_tracks
from wan_mini.tiny.world.tracks import GRID, LATENT_FRAMES, TOKEN, middle_frames, patch_centers, true_positions

__all__ = [
    "BACKGROUNDS", "BAR", "COLORS", "FPS", "FRAMES", "GRID", "HEIGHT", "HELD_OUT", "KINDS", "LATENT_FRAMES",
    "LIMBS", "MOTIONS", "SHADE", "SHAPES", "SPLITS", "TOKEN", "TOP_SPEED", "VIVID", "WIDTH", "Background", "Clip",
    "Motion", "Objects", "Pose", "Scene", "ScenePlan", "Shape", "Sprite", "classify_scene", "correlation",
    "direction", "error_px", "fidelity", "fidelity_published", "fill_missing", "label_pixels", "make_clip",
    "middle_frames", "other_scene", "patch_centers", "plan_clip", "predicted_tracks", "score", "true_positions",
    "true_tracks",
]  # fmt: skip
