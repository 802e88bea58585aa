"""Checkpoint files: headers first, tensors later; which part of a model a file holds and how large it is."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_mini.config import WAN_MEAN, WAN_STD, DiTConfig, UMT5Config, VAEConfig
from wan_mini.layouts import IGNORED, Layout, detect, rename

Shapes = dict[str, tuple[int, ...]]

Configs = list[dict[str, Any]]

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors -> torch


class Entry(NamedTuple):
    """A tensor in a file, as the header describes it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Part:
    """One part of the model as found on disk: its tensors under our names, and all that may tell its configuration."""

    layout: Layout
    tensors: list[tuple[str, Entry]]
    configs: list[dict[str, Any]]

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for _, entry in self.tensors})

    @property
    def where(self) -> str:
        return str(self.files[0]) if len(self.files) == 1 else f"{len(self.files)} files in {self.files[0].parent}"


def _unpickle(file: Path) -> dict[str, Tensor]:
    """A .pth's tensors, mapped rather than read; weights_only, because an unrestricted pickle can run any code."""
    loaded = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    return {k: t for k, t in loaded.items() if isinstance(t, Tensor)} if isinstance(loaded, dict) else {}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if it is something else."""
    with suppress(ValueError):
        if isinstance(content := json.loads(file.read_bytes()), dict):
            return content
    raise ValueError(f"{file} should hold a JSON object, is it truncated? Download it again")


def read_header(file: Path) -> tuple[list[Entry], dict[str, Any]]:
    """A file's tensors without their data, and the `config` in its metadata. Raises ValueError if it is unreadable."""
    try:
        if file.suffix == ".pth":
            tensors = _unpickle(file).items()
            return [Entry(file, key, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in tensors], {}
        with safe_open(file, "pt") as f:
            entries = []
            for key in f.keys():  # noqa: SIM118 (f is no dict)
                header = f.get_slice(key)
                dtype = DTYPES.get(header.get_dtype(), header.get_dtype())
                entries.append(Entry(file, key, tuple(header.get_shape()), dtype))
            return entries, json.loads((f.metadata() or {}).get("config", "{}"))
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(f"{file} cannot be read, is it truncated? Download it again ({reason})") from None


def read_tensors(file: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, tensor) one by one. The tensors are views into the mapped file: copy what is to be kept."""
    if file.suffix == ".pth":
        tensors = _unpickle(file)
        yield from ((key, tensors[key]) for key in keys)
    else:
        with safe_open(file, "pt") as f:
            yield from ((key, f.get_tensor(key)) for key in keys)


def find_parts(path: Path) -> dict[str, Part]:
    """Read the headers of a weight file, or of all of them below a folder -> {"dit" | "vae" | "text_encoder": Part}.

    Files without any known tensor name are passed over. Raises FileNotFoundError, or ValueError for a broken file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a checkpoint folder or a weight file")
    files = sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".pth")) if path.is_dir() else [path]
    found: dict[str, tuple[list[Entry], list[dict[str, Any]]]] = {}
    for file in files:
        entries, config = read_header(file)
        if layout := detect(entry.key for entry in entries):
            all_entries, configs = found.setdefault(layout.part, ([], []))
            all_entries += [entry for entry in entries if not re.match(IGNORED, entry.key)]
            configs.append(config)
    return {part: _part(entries, configs) for part, (entries, configs) in found.items()}


def _part(entries: list[Entry], configs: list[dict[str, Any]]) -> Part:
    """Name all shards' tensors at once: the headers' own configs come first, then config.json beside and above."""
    layout = detect(entry.key for entry in entries)
    names = rename(layout, [entry.key for entry in entries])
    folders = sorted({entry.file.absolute().parent for entry in entries})
    places = folders + sorted({folder.parent for folder in folders})
    configs = configs + [read_json(c) for f in places if (c := f / "config.json").is_file()]
    return Part(layout, [(names[entry.key], entry) for entry in entries], configs)


def dit_config(shapes: Shapes, configs: Configs) -> DiTConfig:
    """Only the number of heads and text_len are not told by shapes; official heads are 128 wide."""
    dim, in_dim, *patch = shapes["patch_embedding.weight"]
    heads, layers, text_len = dim / 128, count(shapes, r"blocks\.(\d+)\."), 512
    for config in reversed(configs):  # the first has the last word
        width = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)  # Diffusers
        if dim in (config.get("dim"), width):  # or else it is the config of something else
            heads = config.get("num_heads", config.get("num_attention_heads", heads))
            layers, text_len = config.get("num_layers", layers), config.get("text_len", text_len)
    if heads != int(heads):
        raise ValueError(f"num_heads is unknown for width {dim}")
    return DiTConfig(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_heads=int(heads),
        num_layers=layers,
        freq_dim=shapes["time_embedding.0.weight"][1],
        text_dim=shapes["text_embedding.0.weight"][1],
        text_len=text_len,
        in_dim=in_dim,
        out_dim=shapes["head.head.weight"][0] // prod(patch),
        patch_size=tuple(patch),
    )


def vae_config(shapes: Shapes, configs: Configs) -> VAEConfig:
    """Only the latents' mean and std are not told by shapes."""
    dim, z_dim = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
    # A level of the encoder is its residual blocks and one downsampling, which only the last level lacks.
    layers = count(shapes, r"encoder\.downsamples\.(\d+)\.")
    blocks = min((i for i in range(layers) if f"encoder.downsamples.{i}.resample.1.weight" in shapes), default=layers)
    firsts = [shapes[f"encoder.downsamples.{i}.residual.2.weight"] for i in range(0, layers, blocks + 1)]
    mean, std = WAN_MEAN, WAN_STD
    for config in (c.get("vae", c) for c in reversed(configs)):  # the first has the last word
        mean = config.get("mean", config.get("latents_mean", mean))
        std = config.get("std", config.get("latents_std", std))
    return VAEConfig(dim, z_dim, tuple(shape[0] // dim for shape in firsts), blocks, tuple(mean), tuple(std))


def umt5_config(shapes: Shapes, configs: Configs) -> UMT5Config:
    """All told by shapes."""
    vocab, dim = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    dim_attn, dim_ffn = shapes["blocks.0.attn.q.weight"][0], shapes["blocks.0.ffn.fc1.weight"][0]
    return UMT5Config(vocab, dim, dim_attn, dim_ffn, heads, count(shapes, r"blocks\.(\d+)\."), buckets)


def count(names: Iterable[str], pattern: str) -> int:
    """How many blocks the names number, from 0."""
    return 1 + max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)


CONFIGS = {"dit": dit_config, "vae": vae_config, "text_encoder": umt5_config}
