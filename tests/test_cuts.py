"""The cut detector on clips of the tiny world, which have none, and on clips that are put together of two."""

import numpy as np
import pytest

from wan_mini.cuts import find_cuts, histogram, split_at_cuts
from wan_mini.tiny.world import KINDS, make_clip


@pytest.mark.parametrize("kind", KINDS)
def test_motion_is_no_cut(kind):
    for seed in range(2):
        assert find_cuts(make_clip(seed, kind).frames) == []


def test_a_histogram_by_hand():
    """A quarter of the pixels is red, the rest black: two bins."""
    frame = np.zeros((2, 2, 3), dtype=np.uint8)
    frame[0, 0, 0] = 255
    shares = histogram(frame)
    assert shares[0] == 0.75 and shares[7 * 64] == 0.25 and shares.sum() == 1


@pytest.mark.parametrize(("at", "lengths"), [(1, (1, 29)), (16, (13, 17)), (18, (17, 13)), (32, (29, 1))])
def test_a_cut_is_where_two_clips_meet(at, lengths):
    first, second = make_clip(3, "single").frames, make_clip(4, "camera").frames
    assert first[0, 0, 0].tolist() != second[0, 0, 0].tolist()
    clip = np.concatenate([first[:at], second[: 33 - at]])
    assert find_cuts(clip) == [at]
    scenes = split_at_cuts(clip)
    assert tuple(map(len, scenes)) == lengths
    assert np.array_equal(scenes[1], second[: lengths[1]])


def test_several_cuts_and_none():
    clips = [make_clip(seed, "single").frames[:5] for seed in (3, 4, 3)]
    assert find_cuts(np.concatenate(clips)) == [5, 10]
    still = np.repeat(clips[0][:1], 9, axis=0)
    assert find_cuts(np.concatenate([still, np.repeat(clips[1][:1], 9, axis=0)])) == [9]  # two stills
    growing = np.zeros((9, 32, 32, 3), dtype=np.uint8)
    for number, frame in enumerate(growing):
        frame[: 3 * number] = 255
    assert find_cuts(growing) == find_cuts(growing.repeat(2, axis=0)) == []  # at half the rate, too
    assert find_cuts(still) == [] and find_cuts(still[:1]) == []
    assert len(split_at_cuts(still)) == 1 and len(split_at_cuts(still)[0]) == 9
