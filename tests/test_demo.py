"""The default run's clip, prompt and summary."""

import numpy as np

from wan_mini.tiny import demo
from wan_mini.tiny.world import classify_scene, label_pixels, make_clip
from wan_mini.video import read_video


def test_the_bundled_clip_is_the_seeds():
    """As far as a compressed file can be: 38 dB."""
    bundled, clip = read_video(demo.REFERENCE), demo.reference_clip().frames
    assert bundled.shape == clip.shape
    assert np.square(bundled.astype(float) - clip).mean() < 255**2 / 10**3.8


def test_the_prompt_keeps_nothing_of_the_clip():
    clip, scene = demo.reference_clip(), demo.target_scene()
    assert scene.background != clip.background
    assert not {word for pair in scene.objects for word in pair} & {word for pair in clip.objects for word in pair}


def test_a_summary_only_of_the_default_run():
    clip, caption = read_video(demo.REFERENCE), demo.target_scene().caption
    assert demo.is_default(clip, caption)
    assert not demo.is_default(clip, caption.lower())
    assert not demo.is_default(clip[:17], caption)
    assert not demo.is_default(make_clip(demo.SEED + 1, demo.KIND, "held-out").frames, caption)


def test_the_summary_of_the_clip_itself():
    """A perfect motion, and everything else as it should not be."""
    clip, scene = demo.reference_clip(), demo.target_scene()
    ((shape, color),), _ = classify_scene(clip.frames, label_pixels(clip.frames), scene)
    line = demo.summary(clip.frames)
    assert (shape, color) == clip.objects[0]
    assert line.startswith("correlation 1.00 with the true path, 0.")
    assert line.endswith(f" px error, direction 1.00; shows a {color} {shape} on another background")
    assert "\n" not in line


def test_the_summary_of_the_target_at_rest():
    """The right thing where it should be, without motion; and of a gray video nothing."""
    seeds = range(400)
    scene = demo.target_scene()
    same = (seed for seed in seeds if shows(make_clip(seed, "single", "held-out", frames=[]), scene))
    still = np.repeat(make_clip(next(same), "single", "held-out", frames=[16]).frames, 33, axis=0)
    (shape, color) = scene.objects[0]
    assert demo.summary(still).startswith("correlation 0.00 with the true path, ")
    assert demo.summary(still).endswith(f"shows a {color} {shape} on the right background")
    assert demo.summary(np.full_like(still, 100)).endswith("shows a no shape on another background")


def shows(clip, scene) -> bool:
    return clip.objects == scene.objects and clip.background == scene.background
