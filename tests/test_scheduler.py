"""The samplers against the official UniPC's trajectory, closed forms and each other."""

import math

import pytest
import torch
from conftest import error, golden

from wan_mini.errors import UserError
from wan_mini.scheduler import FlowEuler, FlowUniPC


@pytest.mark.parametrize(("steps", "shift"), [(10, 5.0), (7, 3.0)])
def test_unipc_equals_the_official_sampler(steps, shift):
    data = {key.split("/")[1]: value for key, value in golden("unipc").items() if key.startswith(f"unipc_{steps}_")}
    sampler = FlowUniPC(steps, shift)
    assert torch.equal(sampler.timesteps, data["timesteps"])
    assert error(sampler.sigmas, data["sigmas"]) < 1e-6
    for _ in range(2):  # the second run must not remember the first
        x = data["trajectory"][0]
        for index, t in enumerate(sampler.timesteps):
            velocity = torch.einsum("ij,bjfhw->bifhw", data["A"], torch.tanh(x)) * (0.5 + t / 1000)
            x = sampler.step(index, x, velocity)
            assert error(x, data["trajectory"][index + 1]) < 1e-5


def test_euler_levels_by_hand():
    sampler = FlowEuler(steps=4, shift=3.0)
    assert sampler.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])  # 3u / (1 + 2u), u = 1, 3/4, 1/2, 1/4, 0
    assert sampler.timesteps.tolist() == pytest.approx([1000, 900, 750, 500])
    weaker = FlowEuler(steps=2, shift=7.0, strength=0.75)
    assert weaker.sigmas.tolist() == pytest.approx([0.75 * 7 / 5.5, 0.375 * 7 / 3.25, 0])


def test_euler_is_exact_on_a_straight_path():
    clean, noise = torch.randn(2, 1, 4, 2, 3, 3)
    sampler = FlowEuler(steps=7, shift=5.0)
    x = noise
    for index in range(7):
        x = sampler.step(index, x, noise - clean)
        sigma = sampler.sigmas[index + 1]
        torch.testing.assert_close(x, (1 - sigma) * clean + sigma * noise)


def test_unipc_converges_faster_than_euler():
    """Clean data N(0, s^2): the velocity is linear and the exact solution x(0) = x(1) s is known."""
    s = 0.4
    start = torch.randn(1000, dtype=torch.float64).float()

    def final_error(sampler):
        x = start * math.hypot((1 - sampler.sigmas[0]) * s, sampler.sigmas[0])
        for index, sigma in enumerate(sampler.sigmas[:-1]):
            variance = ((1 - sigma) * s) ** 2 + sigma**2
            velocity = (sigma - (1 - sigma) * s**2) / variance * x
            x = sampler.step(index, x, velocity)
        return (x - start * s).abs().max()

    assert final_error(FlowUniPC(20, 1.0)) < 0.2 * final_error(FlowEuler(20, 1.0))
    assert final_error(FlowEuler(40, 1.0)) < 0.6 * final_error(FlowEuler(20, 1.0))


def test_steps_are_float32_even_from_bfloat16():
    x = torch.full((3,), 2.0, dtype=torch.bfloat16)
    got = FlowEuler(50, 7.0).step(0, x, torch.ones(3, dtype=torch.bfloat16))
    assert got.dtype == torch.float32 and 1.99 < got[0] < 2.0  # in bfloat16 the step would round away


def test_errors():
    with pytest.raises(UserError, match="got 0, 5.0 and 1.0"):
        FlowEuler(0, 5.0)
    with pytest.raises(UserError, match=r"strength in \(0, 1\], got 10, 5.0 and 1.5"):
        FlowEuler(10, 5.0, 1.5)
    with pytest.raises(UserError, match="got 5 and -1"):
        FlowUniPC(5, -1)
