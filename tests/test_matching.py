"""The loss that supervises a block to match, against its definition."""

import numpy as np
import pytest
import torch

from wan_mini.tiny.training.matching import matching_loss, moving_tokens
from wan_mini.tiny.world import GRID, true_positions
from window import dense_amf

S = GRID[1] * GRID[2]


def random_qk(grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, grid[0] * grid[1] * grid[2], 2, 8, generator=generator) for _ in range(2))


def test_the_loss_reads_the_softmax_of_the_flow():
    """Asked for one position after the other, it gives the weight of each; their mean is where the flow points."""
    grid, tau, (i, u, j) = (3, 4, 5), 3.0, (0, 7, 2)
    q, k = random_qk(grid)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    own, weights = torch.stack([rows, columns], -1).flatten(0, 1), []  # (S,2)
    for position in own:
        positions = torch.full((1, 3, 20, 3, 2), torch.nan)
        positions[0, i, u, j] = position
        weights.append((-2 * matching_loss(q, k, positions, grid, tau)).exp())  # one match, one of two halves
    weights = torch.stack(weights)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(weights @ own - own[u], dense_amf(q, k, grid, [(i, j)], tau=tau)[0, u], atol=1e-4)


def test_the_loss_by_hand():
    """Two frames of 2 x 3 tokens: each cross-entropy by its formula, halves of moving and resting matches."""
    grid, tau = (2, 2, 3), 2.0
    q, k = random_qk(grid)
    own = [(row, column) for row in range(2) for column in range(3)]
    positions = torch.full((1, 2, 6, 2, 2), torch.nan)
    positions[0, 0, 0, 1] = torch.tensor([0.25, 1.5])  # between four tokens
    positions[0, 0, 1, 1] = torch.tensor([0.0, 1.0])  # at rest
    positions[0, 1, 5, 0] = torch.tensor([1.4, -0.4])  # in the frame, but beyond the middles of its last tokens
    positions[0, 0, 2, 0] = torch.tensor([0.0, 2.0])  # the same frame: no match
    entropy = {}
    for (i, s, j), weights in {
        (0, 0, 1): {(0, 1): 0.375, (0, 2): 0.375, (1, 1): 0.125, (1, 2): 0.125},
        (0, 1, 1): {(0, 1): 1.0},
        (1, 5, 0): {(1, 0): 1.0},
    }.items():
        query, keys = q[0, 6 * i + s], k[0, 6 * j : 6 * j + 6]
        logits = tau * torch.tensor([(query * key).sum() / (2 * 8**0.5) for key in keys])
        entropy[i, s, j] = -sum(w * logits.log_softmax(0)[own.index(at)] for at, w in weights.items())
    expected = ((entropy[0, 0, 1] + entropy[1, 5, 0]) / 2 + entropy[0, 1, 1]) / 2
    assert matching_loss(q, k, positions, grid, tau).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_uniform_guess_costs_the_logarithm_of_the_tokens():
    positions = torch.from_numpy(true_positions(0, "camera"))[None]
    q = torch.randn(1, GRID[0] * S, 2, 8)
    assert matching_loss(0 * q, q, positions, GRID, 3.0).item() == pytest.approx(np.log(S), rel=1e-5)


def test_gradients_reach_queries_and_keys():
    positions = torch.from_numpy(true_positions(1))[None]
    q, k = (torch.randn(1, GRID[0] * S, 2, 8, requires_grad=True) for _ in range(2))
    matching_loss(q, k, positions, GRID, 3.0).backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all() and q.grad.abs().sum() > 0 and k.grad.abs().sum() > 0


def test_a_token_moves_by_more_than_the_distance():
    """One token of two frames of 1 x 3; NaN is no motion."""
    positions = torch.full((6, 2, 2), torch.nan)
    positions[1] = torch.tensor([[0.0, 1.25], [0.3, 1.0]])
    assert moving_tokens(positions, (2, 1, 3), 1 / 4).nonzero().tolist() == [[1, 1]]
    assert not moving_tokens(positions, (2, 1, 3), 0.3).any()
