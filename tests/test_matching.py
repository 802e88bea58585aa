"""The true matches against the world's own tracks, and the loss that teaches them against its definition."""

import numpy as np
import pytest
import torch

from wan_mini.tiny.matching import GRID, TOKEN, matching_loss, true_places
from wan_mini.tiny.world import KINDS, make_clip
from window import dense_amf

TIMES = np.maximum(4 * np.arange(GRID[0]) - 2, 0)
S = GRID[1] * GRID[2]


def places_of(seed: int, kind: str) -> np.ndarray:
    return true_places(seed, kind).reshape(*GRID, GRID[0], 2)  # (F,S,F,2) -> (F,H,W,F,2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_moves_as_the_points_on_it(kind):
    """Where a tracked point lies in a token whose middle is on the same thing, both go the same way."""
    compared = []
    for seed in range(12):
        clip, places = make_clip(seed, kind, frames=TIMES), places_of(seed, kind)
        tokens = (clip.tracks + 0.5) / TOKEN - 0.5  # (points,F,2)
        for track, visible in zip(tokens, clip.visible):
            for i in np.flatnonzero(visible):
                row, column = track[i].round().astype(int)
                moved = places[i, row, column] - (row, column) - (track - track[i])  # (F,2)
                compared.append(np.abs(moved[visible & np.isfinite(moved[:, 0])]).max(initial=0))
    # The median, because points near an edge lie in tokens whose middle is on something else. What turns or grows moves
    # unevenly: there a point and its token's middle, up to half a token apart, differ a little.
    assert np.median(compared) < {"camera": 0.1, "articulated": 0.3}.get(kind, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_frame_to_itself_is_home(kind):
    places = places_of(3, kind)
    home = np.stack(np.meshgrid(*map(np.arange, GRID[1:]), indexing="ij"), axis=-1)  # (H,W,2)
    for i in range(GRID[0]):
        assert np.allclose(places[i, :, :, i], home, atol=1e-5)


def test_what_is_hidden_or_gone_has_no_place():
    several = np.stack([true_places(seed, "several") for seed in range(10)])  # sprites pass over the ground
    camera = np.stack([true_places(seed, "camera") for seed in range(10)])  # the ground leaves the frame
    for places in (several, camera):
        unknown = np.isnan(places).any(-1)
        assert 0.005 < unknown.mean() < 0.5
        assert (np.isnan(places).all(-1) == unknown).all()
    assert np.nanmin(camera) >= -0.5 and (np.nanmax(camera, (0, 1, 2, 3)) <= (GRID[1] - 0.5, GRID[2] - 0.5)).all()


def random_qk(grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, grid[0] * grid[1] * grid[2], 2, 8, generator=generator) for _ in range(2))


def test_the_loss_reads_the_softmax_of_the_flow():
    """Asked for one place after the other, it tells the weight of each; their mean is the place that the flow finds."""
    grid, tau, (i, u, j) = (3, 4, 5), 3.0, (0, 7, 2)
    q, k = random_qk(grid)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    own, weights = torch.stack([rows, columns], -1).flatten(0, 1), []  # (S,2)
    for place in own:
        places = torch.full((1, 3, 20, 3, 2), torch.nan)
        places[0, i, u, j] = place
        weights.append((-2 * matching_loss(q, k, places, grid, tau)).exp())  # the only match is one of the two halves
    weights = torch.stack(weights)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(weights @ own - own[u], dense_amf(q, k, grid, [(i, j)], tau=tau)[0, u], atol=1e-4)


def test_the_loss_by_hand():
    """Two frames of 2 x 3 tokens: each cross-entropy by its formula, halves of moving and resting matches."""
    grid, tau = (2, 2, 3), 2.0
    q, k = random_qk(grid)
    own = [(row, column) for row in range(2) for column in range(3)]
    places = torch.full((1, 2, 6, 2, 2), torch.nan)
    places[0, 0, 0, 1] = torch.tensor([0.25, 1.5])  # between four tokens
    places[0, 0, 1, 1] = torch.tensor([0.0, 1.0])  # at rest
    places[0, 1, 5, 0] = torch.tensor([1.4, -0.4])  # in the frame, but beyond the middles of its last tokens
    places[0, 0, 2, 0] = torch.tensor([0.0, 2.0])  # the same frame: no match
    entropy = {}
    for (i, s, j), weights in {
        (0, 0, 1): {(0, 1): 0.375, (0, 2): 0.375, (1, 1): 0.125, (1, 2): 0.125},
        (0, 1, 1): {(0, 1): 1.0},
        (1, 5, 0): {(1, 0): 1.0},
    }.items():
        query, keys = q[0, 6 * i + s], k[0, 6 * j : 6 * j + 6]
        logits = tau * torch.tensor([(query * key).sum() / (2 * 8**0.5) for key in keys])
        entropy[i, s, j] = -sum(w * logits.log_softmax(0)[own.index(at)] for at, w in weights.items())
    wanted = ((entropy[0, 0, 1] + entropy[1, 5, 0]) / 2 + entropy[0, 1, 1]) / 2
    assert matching_loss(q, k, places, grid, tau).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_uniform_guess_costs_the_logarithm_of_the_tokens():
    places = torch.from_numpy(true_places(0, "camera"))[None]
    q = torch.randn(1, GRID[0] * S, 2, 8)
    assert matching_loss(0 * q, q, places, GRID, 3.0).item() == pytest.approx(np.log(S), rel=1e-5)


def test_gradients_reach_queries_and_keys():
    places = torch.from_numpy(true_places(1))[None]
    q, k = (torch.randn(1, GRID[0] * S, 2, 8, requires_grad=True) for _ in range(2))
    matching_loss(q, k, places, GRID, 3.0).backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all() and q.grad.abs().sum() > 0 and k.grad.abs().sum() > 0
