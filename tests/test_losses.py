"""The two losses against closed forms and hand-computed values; test_twins.py has the loops."""

import pytest
import torch

from losses import amf_loss, total_loss, window_loss
from window import frame_pairs, windowed_amf


def test_a_video_is_its_own_minimum():
    grid = (4, 6, 8)
    q, k = (torch.randn(1, 192, 2, 4, requires_grad=True) for _ in range(2))
    pairs = frame_pairs(4, 3)
    flow, _ = windowed_amf(q, k, grid, pairs, window=5)
    loss = amf_loss(flow, flow, pairs, span=3)
    assert loss == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, (q, k)))


def test_the_reference_gets_no_gradient():
    flow_ref, flow_gen = torch.randn(2, 1, 12, 2, requires_grad=True).unbind(0)
    grad = torch.autograd.grad(amf_loss(flow_ref, flow_gen, [(0, 1)], span=1), (flow_ref, flow_gen), allow_unused=True)
    assert grad[0] is None and grad[1] is not None


@pytest.mark.parametrize(("span", "weights"), [(4, [1, 14 / 15, 13 / 15, 0.8]), (2, [1, 0.8]), (1, [1])])
def test_weights_fall_from_one_to_one_minus_alpha(span, weights):
    one = torch.ones(1, 1, 2)  # squared norm 2
    got = [amf_loss(0 * one, one, [(0, d)], span=span).item() / 2 for d in range(1, span + 1)]
    assert got == pytest.approx(weights)


def test_window_loss_by_hand():
    """Three frames, span 2: frame 0 alone has two targets; |mean key of frame 2 - of frame 1|^2 / heads / frames."""
    grid = (3, 1, 2)
    k = torch.tensor([[0.0, 0], [0, 0], [1, 2], [3, 4], [5, 7], [7, 9]]).reshape(1, 6, 2, 1)  # two heads of width 1
    pairs = frame_pairs(3, 2)
    windows = torch.tensor([0, 1]).expand(len(pairs), 1, 2)
    assert window_loss(k, grid, pairs, windows).item() == pytest.approx(((6 - 2) ** 2 + (8 - 3) ** 2) / 2 / 3)


def test_window_loss_of_constant_keys_is_zero():
    grid = (5, 4, 4)
    k = torch.randn(2, 3).expand(1, 80, 2, 3)
    pairs = frame_pairs(5, 4)
    windows = torch.randint(16, (len(pairs), 2, 4))
    assert window_loss(k, grid, pairs, windows) < 1e-10


def test_window_loss_refuses_an_incomplete_set_of_pairs():
    with pytest.raises(ValueError, match=r"all pairs of 4 frames up to distance 2, got \[\(0, 2\)\]"):
        window_loss(torch.zeros(1, 16, 1, 1), (4, 2, 2), [(0, 2)], torch.zeros(1, 1, 1, dtype=torch.long))


def test_total():
    assert total_loss(torch.tensor(2.0), torch.tensor(3.0)) == 13
    assert total_loss(torch.tensor(2.0), torch.tensor(3.0), weights=(1, 10)) == 32
