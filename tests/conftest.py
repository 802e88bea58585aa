"""Fixtures of all tests: two threads, golden files, tiny random models."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

DATA = Path(__file__).parent / "data"


def golden(name: str) -> dict[str, torch.Tensor]:
    """Tensors of one golden file: w/<official name>, in/..., out/..."""
    with safe_open(DATA / "golden" / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no dict)


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict among a golden file's tensors."""
    return {key[2:]: value for key, value in tensors.items() if key.startswith("w/")}


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference over the largest value."""
    assert got.shape == wanted.shape
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
