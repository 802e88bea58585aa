"""The README's picture: paths where they are, and a file of the stated size that says that it was generated."""

import json

import numpy as np
from PIL import Image

from benchmarks import picture
from wan_mini.tiny import demo
from wan_mini.tiny.world import true_tracks


def test_the_tracked_path_of_the_clip_itself(monkeypatch):
    """The reference, asked for by name, is tracked to within a pixel or two."""
    clip = demo.reference_clip()
    tracks, _ = true_tracks(clip)
    monkeypatch.setattr(demo, "target_scene", lambda: clip)
    path = picture.tracked_path(clip.frames)
    assert np.abs(path - tracks[0]).mean() < 2


def test_paths_are_drawn_where_they_are():
    frames = np.full((4, 64, 96, 3), 90, np.uint8)
    path = np.array([10 + 10j, 20 + 10j, 20 + 30j, np.nan])
    drawn = picture.draw_paths(frames, path, path)
    assert drawn.shape == (4, 128, 192, 3)
    orange = np.array([255, 157, 0])
    x, y = map(int, picture.pixel(15 + 10j))
    assert (drawn[0, y, x] == 255).all()  # before the object is there: the true path, white
    assert np.abs(drawn[1, y, x].astype(int) - orange).max() < 3  # afterwards the tracked one
    assert (drawn[3, 4:8, 150:] == 90).all()


def test_captions_and_label(tmp_path):
    frames = np.stack([np.full((20, 200, 3), level, np.uint8) for level in (0, 90, 200)])
    captioned = picture.with_caption(frames, "reference")
    assert captioned.shape == (3, 20 + picture.CAPTION, 200, 3)
    assert captioned[0, : picture.CAPTION].min() < 100  # letters
    picture.save(tmp_path / "p.webp", captioned, {"ai_generated": True})
    with Image.open(tmp_path / "p.webp") as image:
        assert image.n_frames == 3
        assert json.loads(image.getexif()[0x010E])["ai_generated"]


def test_the_readme_shows_three_panels_of_the_default_run():
    with Image.open(picture.PICTURE) as image:
        height, width, frames = image.height, image.width, image.n_frames
    shape = demo.reference_clip().frames.shape
    assert (frames, height, width) == (shape[0], 2 * shape[1] + picture.CAPTION, 6 * shape[2])
    assert picture.PICTURE.stat().st_size < 800_000
