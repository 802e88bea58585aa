"""What a checkpoint's files hold: their headers, and one rename table per naming that is not the original's.

Files are told apart by the tensor names inside, never by their own names: mirrors rename files.
"""

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

Shapes = dict[str, tuple[int, ...]]
Configs = list[dict[str, Any]]

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors -> torch
PREFIX = r"^(model\.)?diffusion_model\."  # some single-file DiTs are cut out of a larger checkpoint
IGNORED = r"^spiece_model$"  # Comfy-Org keeps the tokenizer's bytes beside the text encoder's weights


class Layout(NamedTuple):
    """One naming of one part: `marker` finds it, `renames` (pattern, replacement), all applied in order, undo it."""

    part: str
    naming: str
    marker: str
    renames: tuple[tuple[str, str], ...] = ()


# The first match wins, and `patch_embedding` has the same name in both DiT layouts: Diffusers' comes first.
LAYOUTS = (
    Layout(
        "dit",
        "Diffusers",
        r"^(condition_embedder|proj_out|scale_shift_table|blocks\.\d+\.(attn[12]|scale_shift_table|ffn\.net))(\.|$)",
        (
            (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
            (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
            (r"^condition_embedder\.time_proj\.", "time_projection.1."),
            (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
            (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
            (r"^proj_out\.", "head.head."),
            (r"^scale_shift_table$", "head.modulation"),
            (r"\.scale_shift_table$", ".modulation"),
            (r"\.attn1\.", ".self_attn."),
            (r"\.attn2\.", ".cross_attn."),
            (r"\.to_([qkv])\.", r".\1."),
            (r"\.to_out\.0\.", ".o."),
            (r"\.norm2\.", ".norm3."),  # the two count norms differently: this one stands before cross-attention
            (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
            (r"\.ffn\.net\.2\.", ".ffn.2."),
        ),
    ),
    Layout(
        "dit",
        "original",
        r"^((patch|text|time)_embedding|time_projection|head|blocks\.\d+\.(self_attn|cross_attn|modulation|ffn\.[02]))"
        r"(\.|$)",
    ),
    Layout(
        "vae",
        "Diffusers",
        r"^(((en|de)coder\.(conv_in|conv_out|norm_out|mid_block|down_blocks|up_blocks))|(post_)?quant_conv)\.",
        (
            (r"\.conv1\.", ".residual.2."),  # inside a residual block; before conv_in takes the name conv1
            (r"\.conv2\.", ".residual.6."),
            (r"\.norm1\.", ".residual.0."),
            (r"\.norm2\.", ".residual.3."),
            (r"\.conv_shortcut\.", ".shortcut."),
            (r"^quant_conv\.", "conv1."),
            (r"^post_quant_conv\.", "conv2."),
            (r"\.conv_in\.", ".conv1."),
            (r"\.norm_out\.", ".head.0."),
            (r"\.conv_out\.", ".head.2."),
            (r"\.down_blocks\.", ".downsamples."),
            (r"\.mid_block\.resnets\.0\.", ".middle.0."),
            (r"\.mid_block\.attentions\.0\.", ".middle.1."),
            (r"\.mid_block\.resnets\.1\.", ".middle.2."),
        ),
    ),
    Layout("vae", "original", r"^(en|de)coder\.(conv1|head|middle|downsamples|upsamples)\."),
    Layout(
        "text_encoder",
        "Hugging Face",
        r"^(shared|encoder\.(embed_tokens|block|final_layer_norm))\.",
        (
            (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),  # one tensor, tied: a file holds either or both
            (r"^encoder\.final_layer_norm\.", "norm."),
            (r"^encoder\.block\.", "blocks."),
            (r"\.layer\.0\.layer_norm\.", ".norm1."),
            (r"\.layer\.1\.layer_norm\.", ".norm2."),
            (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
            (r"\.layer\.0\.SelfAttention\.", ".attn."),
            (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
            (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
            (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
        ),
    ),
    Layout("text_encoder", "original", r"^(token_embedding|blocks\.\d+\.(attn|pos_embedding|ffn\.(gate|fc[12])))\."),
)


def detect(keys: Iterable[str]) -> Layout | None:
    """The layout that has any of these tensor names, or None."""
    keys = [re.sub(PREFIX, "", key) for key in keys]
    return next((layout for layout in LAYOUTS if any(re.match(layout.marker, key) for key in keys)), None)


def rename(layout: Layout, keys: Iterable[str]) -> dict[str, str]:
    """{tensor name in the file: our name} for all tensors of one part; a name that no rule knows stays as it is."""
    plain = {key: re.sub(PREFIX, "", key) for key in keys}
    # Diffusers numbers the decoder's blocks by stage, the original straight through: in sorted order, they agree.
    ups = sorted({m[0] for key in plain.values() if (m := re.match(r"decoder\.up_blocks\.\d\.\w+\.\d\.", key))})
    table = [(re.escape(up), f"decoder.upsamples.{i}.") for i, up in enumerate(ups)] + list(layout.renames)
    for pattern, replacement in table:
        plain = {key: re.sub(pattern, replacement, name) for key, name in plain.items()}
    return plain


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


# Configurations: shapes tell nearly all; a config that the checkpoint carries tells the rest, else it is the official.
# KeyError: no such tensor. ValueError: neither shapes nor configs tell.


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
