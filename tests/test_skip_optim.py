"""The gradient-reuse loop against AdamW itself, with counted gradients; test_twins.py has its formula."""

import pytest
import torch

from skip_optim import optimize


class Bowl:
    """A loss with a known gradient that counts its evaluations."""

    def __init__(self, shape):
        self.target = torch.randn(shape)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return ((x - self.target) ** 4).sum() + torch.sin(3 * x).sum()

    def gradient(self, x):
        return 4 * (x - self.target) ** 3 + 3 * torch.cos(3 * x)


def test_interval_one_is_adamw_to_the_bit():
    x0, loss = torch.randn(4, 5), Bowl((4, 5))
    got, report = optimize(x0, loss, steps=10, interval=1)
    x = x0.clone().requires_grad_()
    adamw = torch.optim.AdamW([x], weight_decay=0.0)
    for j in range(10):
        adamw.param_groups[0]["lr"] = 0.003 + (0.002 - 0.003) * j / 9
        adamw.zero_grad()
        loss(x).backward()
        adamw.step()
    assert torch.equal(got, x.detach())
    assert report.gradients == 10


def test_reuse_is_backward_of_the_surrogate_to_the_bit():
    """The released code calls backward on (x * g).sum() in a reuse step; keeping x.grad is the same."""
    x0, loss = torch.randn(4, 5), Bowl((4, 5))
    got, _ = optimize(x0, loss, steps=10, interval=3)
    x = x0.clone().requires_grad_()
    adamw = torch.optim.AdamW([x], weight_decay=0.0)
    for j in range(10):
        adamw.param_groups[0]["lr"] = 0.003 + (0.002 - 0.003) * j / 9
        adamw.zero_grad()
        if j % 3 == 0:
            loss(x).backward()
            kept = x.grad.clone()
        else:
            (x * kept).sum().backward()
        adamw.step()
    assert torch.equal(got, x.detach())


def test_first_step_moves_every_element_by_the_rate():
    """In float32, and from a bfloat16 latent too, where a third of the elements would not move."""
    gradient = torch.randn(1000)
    for dtype in (torch.float32, torch.bfloat16):
        x0 = (3 * torch.randn(1000)).to(dtype)
        x, _ = optimize(x0, lambda x: (x * gradient).sum(), steps=1)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x - x0.float(), -0.003 * gradient.sign(), rtol=0, atol=1e-6)


def test_loss_falls_and_the_latent_given_is_untouched():
    x0, loss = torch.randn(50), Bowl((50,))
    before = x0.clone()
    _, report = optimize(x0, loss, steps=30, interval=3, lr=(0.05, 0.05))
    assert report.losses[-1] < 0.8 * report.losses[0]
    assert torch.equal(x0, before) and not x0.requires_grad


def test_works_where_gradients_are_switched_off():
    with torch.no_grad():
        x, report = optimize(torch.ones(3), lambda x: x.square().sum(), steps=2, interval=1)
    assert report.gradients == 2 and (x < 1).all()


def test_errors():
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        optimize(torch.ones(1), torch.sum, steps=0)
    with pytest.raises(FloatingPointError, match="loss is nan at inner step 0"):
        optimize(torch.ones(1), lambda x: (x * float("nan")).sum())
