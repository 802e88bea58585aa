"""Arrows that point where the flow goes, and clips that stand side by side."""

import numpy as np
import torch
from PIL import Image, ImageDraw

from wan_mini.runs.preview import CAPTION, draw_arrow, side_by_side, with_arrows


def changed(picture: np.ndarray) -> np.ndarray:
    """Rows and columns (n, 2) of the pixels that are not gray any more."""
    return np.argwhere((picture != 128).any(-1))


def test_an_arrow_goes_from_start_to_end():
    image = Image.new("RGB", (100, 60), (128, 128, 128))
    draw_arrow(ImageDraw.Draw(image), (20, 30), (60, 0), size=4)
    touched = changed(np.asarray(image))
    assert touched[:, 1].min() in range(17, 21) and touched[:, 1].max() in range(79, 84)
    head = touched[touched[:, 1] > 70]
    tail = touched[touched[:, 1] < 40]
    assert np.ptp(head[:, 0]) > np.ptp(tail[:, 0])  # the head is at the end it points to


def test_arrows_follow_the_flow_of_their_latent_frame():
    """Three latent frames are nine video frames: the first flow holds for the first frame, the second for the rest."""
    frames = np.full((9, 48, 64, 3), 128, np.uint8)
    flow = torch.zeros(2, 12, 2)  # grid of 3 x 4 tokens of 16 pixels
    flow[0, :, 1] = 1.0  # one token to the right
    flow[1, :, 0] = -1.0  # one token up
    drawn = with_arrows(frames, flow, (3, 3, 4), tile=(3, 4))
    assert (frames == 128).all()  # a copy is drawn on
    right, up, last = changed(drawn[0]), changed(drawn[1]), changed(drawn[8])
    assert np.ptp(right[:, 1]) > 14 > np.ptp(right[:, 0]) and right[:, 1].max() in range(46, 52)
    assert np.ptp(up[:, 0]) > 14 > np.ptp(up[:, 1]) and up[:, 0].min() in range(4, 10)
    assert np.array_equal(up, last)


def test_no_motion_is_a_dot():
    drawn = with_arrows(np.full((5, 48, 64, 3), 128, np.uint8), torch.zeros(1, 12, 2), (2, 3, 4), tile=(3, 4))
    dot = changed(drawn[0])
    assert 4 < len(dot) < 40 and np.abs(dot.mean(0) - (24, 32)).max() < 1


def test_clips_stand_side_by_side_under_their_names():
    left, right = np.full((5, 32, 48, 3), 10, np.uint8), np.full((9, 32, 16, 3), 200, np.uint8)
    both = side_by_side({"left": left, "right": right})
    assert both.shape == (5, 32 + CAPTION, 64, 3)
    assert (both[:, CAPTION:, :48] == 10).all() and (both[:, CAPTION:, 48:] == 200).all()
    assert (both[:, :CAPTION, :48] < 100).any()  # there is text
