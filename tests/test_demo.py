"""The default run's clip, prompt and verdict."""

import numpy as np

from wan_mini.tiny import demo
from wan_mini.tiny.measure import label, read_scene
from wan_mini.tiny.world import make_clip
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


def test_a_verdict_only_on_the_default_run():
    clip, caption = read_video(demo.REFERENCE), demo.target_scene().caption
    assert demo.is_default(clip, caption)
    assert not demo.is_default(clip, caption.lower())
    assert not demo.is_default(clip[:17], caption)
    assert not demo.is_default(make_clip(demo.SEED + 1, demo.KIND, "held-out").frames, caption)


def test_the_verdict_on_the_clip_itself():
    """A perfect motion, and everything else as it should not be."""
    clip, scene = demo.reference_clip(), demo.target_scene()
    (seen,), _ = read_scene(clip.frames, label(clip.frames), scene)
    said = demo.verdict(clip.frames)
    assert said.startswith("correlation 1.00 with the true path, 0.")
    assert said.endswith(f"direction 1.00; it shows a {seen[1]} {seen[0]} on another ground")
