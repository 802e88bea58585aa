"""What several tests share: one thread, marks, golden files, a small random checkpoint, a seed, a cache."""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for subprocesses: tests take turns on few cores

import pytest
import torch
from safetensors import safe_open

from wan_mini.config import DiTConfig, UMT5Config, VAEConfig
from wan_mini.dit import WanDiT
from wan_mini.load import Wan, load_wan, save_wan
from wan_mini.tiny.training.grammar import CHARACTERS, tokenizer_json
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

DATA = Path(__file__).parent / "data"

LONGEST = ("test_gpu_day", "test_full_size", "test_checkpoint")  # minutes each: at the end, all would wait for them

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes, and skip tests marked `gpu` where there is no GPU.

    The marks themselves stand in pyproject.toml.
    """
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))  # stable: all else stays in order
    if torch.cuda.is_available() or "REHEARSE_GPU" in os.environ:  # benchmarks/gpu_day.py --rehearse
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch finds none here"))


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect() -> None:
    """Take what has been imported out of the garbage collector's sight: it would be walked through in every test."""
    gc.freeze()


def golden(name: str) -> dict[str, torch.Tensor]:
    """Tensors of one golden file: w/<official name>, in/..., out/..."""
    with safe_open(DATA / "golden" / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no dict)


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict among a golden file's tensors."""
    return {key[2:]: value for key, value in tensors.items() if key.startswith("w/")}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest value."""
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


def random_checkpoint(path: Path, seed: int) -> Path:
    """Write a checkpoint folder with random weights, smaller still than the tiny model."""
    dit = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=6, freq_dim=32, text_dim=16, text_len=64)
    text = UMT5Config(vocab=100, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = WanDiT(dit), WanVAE(VAEConfig(dim=4, num_res_blocks=1)), UMT5Encoder(text)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = path.parent / f"{path.name}-tokenizer.json"
    tokenizer.write_text(json.dumps(tokenizer_json(dict.fromkeys(CHARACTERS, -1.0))), encoding="utf-8")
    save_wan(path, *modules, tokenizer)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random", seed=0)


@pytest.fixture(scope="session")
def wan(folder) -> Wan:
    return load_wan(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory) -> Iterator[None]:
    """Hashes are remembered in a folder of this session, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def reference() -> dict[str, torch.nn.Module]:
    """Diffusers' and transformers' own modules, see layout_folders (imported here, because they take seconds)."""
    import layout_folders

    return layout_folders.reference_modules()


@pytest.fixture(scope="session")
def folders(reference, tmp_path_factory) -> dict[str, Path]:
    """The same random model in every published layout, {layout: folder}."""
    import layout_folders

    return layout_folders.write_folders(reference, tmp_path_factory.mktemp("layouts"))


@pytest.fixture
def broken(folders, tmp_path):
    """A function of kind and edit: it writes a file of one part, after edit(its tensors)."""
    import layout_folders

    return lambda kind, edit: layout_folders.write_broken(folders, kind, edit, tmp_path)
