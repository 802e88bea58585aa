"""The start noise: what a seed gives stays as it was, a key gives its own, and both are Gaussian."""

import hashlib
import math

import numpy as np
import pytest
import torch

from wan_mini.noise import philox_key, start_noise

SHAPE = (1, 16, 9, 16, 24)


def test_without_a_key_a_seed_gives_what_torch_gives():
    for seed in (0, 7, 2**31):
        expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(start_noise(SHAPE, seed), expected)
        assert torch.equal(start_noise(SHAPE, seed, "", "tiny"), expected)


def test_with_a_key_it_is_numpys_philox_of_the_identifier():
    digest = hashlib.sha256(b'["studio", "tiny", 7]').hexdigest()
    expected = np.random.Generator(np.random.Philox(key=int(digest[:32], 16))).standard_normal(SHAPE, dtype=np.float32)
    got = start_noise(SHAPE, 7, "studio", "tiny")
    assert torch.equal(got, torch.from_numpy(expected)) and torch.equal(got, start_noise(SHAPE, 7, "studio", "tiny"))
    assert got.dtype == torch.float32


def test_key_model_and_seed_each_count():
    identifiers = [(7, "studio", "tiny"), (8, "studio", "tiny"), (7, "studi", "otiny"), (7, "studio", "custom")]
    noises = [start_noise(SHAPE, *identifier) for identifier in identifiers] + [start_noise(SHAPE, 7)]
    assert len({philox_key(*identifier) for identifier in identifiers}) == 4
    size = math.prod(SHAPE)
    for index, noise in enumerate(noises):
        for other in noises[:index]:
            assert abs((noise * other).sum().item()) < 5 * math.sqrt(size)  # uncorrelated


@pytest.mark.parametrize("key", ["", "studio"])
def test_it_is_gaussian(key):
    """Kolmogorov and Smirnov's distance of 442,368 values to the normal distribution, and its moments."""
    noise = torch.cat([start_noise(SHAPE, seed, key, "tiny").flatten() for seed in range(8)]).double()
    count = len(noise)
    ranks = torch.arange(1, count + 1, dtype=torch.float64) / count
    distance = (torch.special.ndtr(noise.sort().values) - ranks).abs().max().item()
    assert distance < 1.95 / math.sqrt(count)  # exceeded once in a thousand
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise**power).mean().item() - moment) < 4 * math.sqrt(variance / count)
