"""Muon: its orthogonal matrices against the singular value decomposition, its step against the formula."""

import pytest
import torch
from torch import nn

from wan_mini.tiny.training.muon import MOMENTUM, Muon, orthogonalized, split_parameters


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (1, 6), (64, 64)])
def test_orthogonalized_keeps_the_directions(shape):
    matrix = torch.randn(shape)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    ours = orthogonalized(1000 * matrix[None])[0]  # no matter how large
    inside = u.mT @ ours @ vh.mT  # diagonal if the singular vectors are kept
    off_diagonal = inside - torch.diag(inside.diagonal())
    assert off_diagonal.abs().max() < 0.01
    large = torch.linalg.svdvals(matrix / matrix.norm()) > 0.01  # what the polynomial promises
    assert inside.diagonal()[large].min() > 0.6 and inside.diagonal().max() < 1.3


def test_zero_stays_zero():
    assert torch.equal(orthogonalized(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_step_follows_the_formula():
    weight, gradients = nn.Parameter(torch.randn(6, 2, 1, 2)), torch.randn(2, 6, 2, 1, 2)
    expected, average = weight.detach().clone(), torch.zeros(6, 2, 1, 2)
    muon = Muon([weight], lr=0.1)
    for gradient in gradients:
        weight.grad = gradient.clone()
        muon.step()
        average = MOMENTUM * average + (1 - MOMENTUM) * gradient
        ahead = (1 - MOMENTUM) * gradient + MOMENTUM * average
        update = orthogonalized(ahead.reshape(1, 6, 4)).reshape(6, 2, 1, 2)
        expected = expected - 0.1 * (6 / 4) ** 0.5 * update  # more outputs than inputs: a longer step
    assert torch.allclose(weight, expected, atol=1e-6)


def test_products_in_bfloat16_turn_the_step_little():
    gradient = torch.randn(24, 16)
    steps = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.zeros(24, 16))
        weight.grad = gradient.clone()
        Muon([weight], lr=0.1, dtype=dtype).step()
        steps.append(weight.detach().flatten())
    assert torch.cosine_similarity(*steps, dim=0) > 0.999 and not torch.equal(*steps)


def test_weights_of_one_shape_do_not_mix():
    gradients = torch.randn(3, 4, 6)
    together, alone = [[nn.Parameter(torch.zeros(4, 6)) for _ in range(3)] for _ in range(2)]
    for weights in (together, alone):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
    Muon(together, lr=0.1).step()
    for weight in alone:
        Muon([weight], lr=0.1).step()
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_weight_without_gradient_stays():
    weight = nn.Parameter(torch.randn(3, 3))
    before = weight.detach().clone()
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight, before)


def test_every_parameter_has_one_optimizer():
    model = nn.ModuleList(
        [nn.Linear(2, 3), nn.Conv3d(2, 3, 1), nn.Conv2d(2, 2, 3), nn.Embedding(4, 2), nn.LayerNorm(2)]
    )
    matrices, rest = split_parameters(model)
    assert {id(p) for p in matrices} == {id(layer.weight) for layer in model[:3]}
    assert len(matrices) + len(rest) == len({id(p) for p in [*matrices, *rest]}) == len(list(model.parameters()))
