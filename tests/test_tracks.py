"""The true positions of tokens against the world's own tracks."""

import numpy as np
import pytest

from wan_mini.tiny.world import GRID, KINDS, TOKEN, make_clip, true_positions

TIMES = np.maximum(4 * np.arange(GRID[0]) - 2, 0)


def positions_of(seed: int, kind: str) -> np.ndarray:
    return true_positions(seed, kind).reshape(*GRID, GRID[0], 2)  # (F,S,F,2) -> (F,H,W,F,2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_moves_as_the_points_on_it(kind):
    """Where a tracked point lies in a token whose middle is on the same thing, both go the same way."""
    compared = []
    for seed in range(12):
        clip, positions = make_clip(seed, kind, frames=TIMES), positions_of(seed, kind)
        tokens = (clip.tracks + 0.5) / TOKEN - 0.5  # (points,F,2)
        for track, visible in zip(tokens, clip.visible):
            for i in np.flatnonzero(visible):
                row, column = track[i].round().astype(int)
                moved = positions[i, row, column] - (row, column) - (track - track[i])  # (F,2)
                compared.append(np.abs(moved[visible & np.isfinite(moved[:, 0])]).max(initial=0))
    # The median, because points near an edge lie in tokens whose middle is on something else. What turns or grows moves
    # unevenly: there a point and its token's middle, up to half a token apart, differ a little.
    assert np.median(compared) < {"camera": 0.1, "articulated": 0.3}.get(kind, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_frame_to_itself_is_home(kind):
    positions = positions_of(3, kind)
    home = np.stack(np.meshgrid(*map(np.arange, GRID[1:]), indexing="ij"), axis=-1)  # (H,W,2)
    for i in range(GRID[0]):
        assert np.allclose(positions[i, :, :, i], home, atol=1e-5)


def test_what_is_hidden_or_gone_has_no_position():
    several = np.stack([true_positions(seed, "several") for seed in range(10)])  # sprites pass over the background
    camera = np.stack([true_positions(seed, "camera") for seed in range(10)])  # the background leaves the frame
    for positions in (several, camera):
        unknown = np.isnan(positions).any(-1)
        assert 0.005 < unknown.mean() < 0.5
        assert (np.isnan(positions).all(-1) == unknown).all()
    assert np.nanmin(camera) >= -0.5 and (np.nanmax(camera, (0, 1, 2, 3)) <= (GRID[1] - 0.5, GRID[2] - 0.5)).all()
