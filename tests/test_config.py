"""Geometry: how pixels, latents and tokens relate, against numbers worked out by hand and against the models."""

import dataclasses

import pytest
import torch

from wan_mini import config
from wan_mini.config import (
    PATCH,
    TINY,
    TINY_VAE,
    TOKEN_SIZE,
    DiTConfig,
    VAEConfig,
    frames_of,
    latent_frames,
    latent_shape,
    token_grid,
    valid_frames,
    valid_size,
)
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.vae import WanVAE


def test_wan_at_480p():
    """81 frames of 480x832: 21 latent frames of 60x104, in 30x52 tokens (Wan technical report, 4.1)."""
    assert latent_shape(81, 480, 832) == (1, 16, 21, 60, 104)
    assert token_grid(81, 480, 832) == (21, 30, 52)
    assert TOKEN_SIZE == 16 and PATCH == (1, 2, 2)
    assert latent_shape(1, 8, 24, channels=4) == (1, 4, 1, 1, 3)


def test_the_shapes_are_those_of_the_models():
    with torch.device("meta"):
        vae = WanVAE(TINY_VAE)
        dit = WanDiT(TINY)
    for frames, height, width in ((1, 16, 16), (5, 32, 48), (9, 48, 16)):
        latents = vae.encode(torch.zeros(1, 3, frames, height, width, device="meta"))
        assert latents.shape == latent_shape(frames, height, width)
        assert dit.grid(latents) == token_grid(frames, height, width)
        assert vae.decode(latents).shape == (1, 3, frames_of(latents.shape[2]), height, width)


def test_latent_frames_and_back():
    assert [latent_frames(n) for n in (1, 5, 9, 33, 81)] == [1, 2, 3, 9, 21]
    assert [frames_of(n) for n in (1, 2, 3, 9, 21)] == [1, 5, 9, 33, 81]


def test_valid_frames_is_the_nearest_4k_plus_1_that_exists():
    assert [valid_frames(n) for n in (77, 78, 79, 80, 81, 82, 5)] == [77, 77, 77, 81, 81, 81, 5]
    assert [valid_frames(80, n) for n in (80, 81, 17, 16, 5)] == [77, 81, 17, 13, 5]


def test_valid_size_cuts_down_to_16():
    assert valid_size((480, 854)) == (480, 848)
    assert valid_size((1080, 1920)) == (1072, 1920)


@pytest.mark.parametrize(
    ("function", "sizes", "message"),
    [
        (latent_shape, (80, 480, 832), "frames must be 4k+1, got 80: try 81"),
        (latent_shape, (0, 480, 832), "frames must be 4k+1, got 0: try 1"),
        (latent_shape, (81, 484, 832), "multiples of 8, got 484x832"),
        (latent_shape, (81, 480, 0), "multiples of 8, got 480x0"),
        (token_grid, (81, 488, 832), "multiples of 16, got 488x832"),
        (token_grid, (81, 480, 840), "multiples of 16, got 480x840"),
        (token_grid, (81, 0, 832), "multiples of 16, got 0x832"),
        (token_grid, (3, 480, 832), "frames must be 4k+1, got 3: try 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(function, sizes, message):
    with pytest.raises(UserError) as caught:
        function(*sizes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_configs_that_cannot_be_are_named():
    with pytest.raises(UserError, match="heads of even width, got 50 / 4"):
        DiTConfig(dim=50, ffn_dim=8, num_heads=4, num_layers=1)
    with pytest.raises(UserError, match="z_dim=16 numbers, got 2 and 16"):
        VAEConfig(mean=(0.0, 1.0))
    with pytest.raises(UserError, match=r"4 levels.*got \(1, 2\)"):
        VAEConfig(dim_mult=(1, 2))


def test_presets_cannot_be_changed():
    presets = [
        value for value in vars(config).values() if dataclasses.is_dataclass(value) and not isinstance(value, type)
    ]
    assert len(presets) == 7
    for preset in presets:
        with pytest.raises(dataclasses.FrozenInstanceError):
            preset.dim = 1
