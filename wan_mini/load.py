"""Load Wan 2.1 from any of its published checkpoints, or refuse in one line.

    python -m wan_mini.load FOLDER           what is there, what is missing and where to get it
    python -m wan_mini.load --compare A B    do two DiT checkpoints compute the same, block by block?

A wrong weight rarely crashes; it makes a worse video. So loading is strict: every tensor of a module comes from exactly
one place, has the right shape, is finite, and no weight matrix is all zero.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan_mini.checkpoint import CONFIGS, DTYPES, Entry, Part, find_parts, read_json, read_tensors
from wan_mini.config import T2V_1_3B, T2V_14B, TINY, TINY_UMT5, TINY_VAE, UMT5_XXL, WAN_VAE
from wan_mini.dit import WanDiT, keeps_float32
from wan_mini.tokenizer import Tokenizer
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

MODULES = {"dit": WanDiT, "vae": WanVAE, "text_encoder": UMT5Encoder}
NAMES = {T2V_1_3B: "Wan2.1-T2V-1.3B", T2V_14B: "Wan2.1-T2V-14B", TINY: "tiny"}
ORIGINAL, COMFY = "Wan-AI/Wan2.1-T2V-1.3B", "Comfy-Org/Wan_2.1_ComfyUI_repackaged"  # repositories on Hugging Face
SOURCES = {  # part: file of ORIGINAL, folder of ORIGINAL-Diffusers, file of COMFY
    "dit": ("diffusion_pytorch_model.safetensors", "transformer/", "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors"),
    "vae": ("Wan2.1_VAE.pth", "vae/", "vae/wan_2.1_vae.safetensors"),
    "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder/", "text_encoders/umt5_xxl_fp16.safetensors"),
    "tokenizer": ("google/umt5-xxl/tokenizer.json", "tokenizer/", None),
}
TIED = {"shared.weight", "encoder.embed_tokens.weight"}  # one tensor that a text encoder may hold under both names


@dataclass(frozen=True)
class Wan:
    """A whole model, ready to run: modules in eval mode, without gradients."""

    dit: WanDiT
    vae: WanVAE
    text_encoder: UMT5Encoder
    tokenizer: Tokenizer
    name: str  # "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "tiny" or "custom"


def load_wan(folder: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> Wan:
    """Load a checkpoint folder of any layout; `dtype` is for the DiT and the text encoder.

    The VAE is always float32, because encoding in bfloat16 shifts trajectories. All headers are checked before any
    weight is read. Raises FileNotFoundError for a missing part, ValueError for a bad one, in one line that says which.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: {download_hint('dit')}, with its other files, and give their folder"
        )
    parts, tokenizer = find_parts(Path(folder)), load_tokenizer(folder)
    modules = {kind: build_and_check(require_part(parts, kind, folder)) for kind in MODULES}
    for kind, module in modules.items():
        load_weights(module, parts[kind], device, torch.float32 if kind == "vae" else dtype)
    return Wan(**modules, tokenizer=tokenizer, name=NAMES.get(modules["dit"].config, "custom"))


def build_modules(model: str | Path | None) -> tuple[str, dict[str, nn.Module]]:
    """Name and weightless parts (on the meta device) of a checkpoint folder; if there is none, of a preset's name.

    None is the tiny preset. Raises FileNotFoundError, or ValueError as load_wan.
    """
    if model is not None and Path(model).exists():
        found = find_parts(Path(model))
        parts = {kind: build_and_check(require_part(found, kind, model)) for kind in MODULES}
        return NAMES.get(parts["dit"].config, "custom"), parts
    presets = {name: (dit, WAN_VAE, UMT5_XXL) for dit, name in NAMES.items()} | {"tiny": (TINY, TINY_VAE, TINY_UMT5)}
    name = "tiny" if model is None else str(model)
    if name not in presets:
        raise FileNotFoundError(f"{model} does not exist: give a checkpoint folder, {download_hint('dit')}")
    with torch.device("meta"):
        return name, {kind: MODULES[kind](config) for kind, config in zip(MODULES, presets[name])}


def load_dit(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> WanDiT:
    """Load the DiT from a file or a checkpoint folder; what keeps_float32 names stays float32. Raises as load_wan."""
    return load_part("dit", path, device, dtype)


def load_vae(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> WanVAE:
    """Load the VAE from a file or a checkpoint folder. Raises as load_wan."""
    return load_part("vae", path, device, dtype)


def load_text_encoder(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> UMT5Encoder:
    """Load the text encoder from a file or a checkpoint folder. Raises as load_wan."""
    return load_part("text_encoder", path, device, dtype)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.json, or the one below a checkpoint folder. Raises as load_wan."""
    return Tokenizer.from_file(find_tokenizer(Path(path)))


def save_wan(folder: str | Path, dit: WanDiT, vae: WanVAE, text_encoder: UMT5Encoder, tokenizer: str | Path) -> None:
    """Write a folder in the original layout, but safetensors instead of pickles; `tokenizer` is a file to copy."""
    folder = Path(folder)
    (folder / "google/umt5-xxl").mkdir(parents=True, exist_ok=True)
    for name, module in (("diffusion_pytorch_model", dit), ("Wan2.1_VAE", vae), ("models_t5_umt5", text_encoder)):
        tensors = {key: tensor.cpu().contiguous() for key, tensor in module.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors", {"config": json.dumps(asdict(module.config))})
    config = {"_class_name": "WanModel", "model_type": "t2v", **asdict(dit.config)}
    config["vae"] = {"mean": vae.config.mean, "std": vae.config.std}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(tokenizer, folder / "google/umt5-xxl/tokenizer.json")


# Three steps: pick the part, check its headers against the module, and only then read tensor by tensor.


def load_part(kind: str, path: str | Path, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Find, check and read one part."""
    part = require_part(find_parts(Path(path)), kind, path)
    return load_weights(build_and_check(part), part, device, dtype)


def require_part(parts: dict[str, Part], kind: str, path: str | Path) -> Part:
    """The part of this kind. Raises FileNotFoundError that says where to get it."""
    if kind not in parts:
        raise FileNotFoundError(f"no {kind} in {path}, {download_hint(kind)}")
    return parts[kind]


def find_tokenizer(path: Path) -> Path:
    """The only tokenizer.json below a folder, or the file itself. Raises FileNotFoundError, or ValueError on two."""
    files = sorted(path.rglob("tokenizer.json")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"no tokenizer in {path}, {download_hint('tokenizer')}")
    if len(files) > 1:
        raise ValueError(f"{files[0]} and {files[1]} are both tokenizers: keep one of them")
    return files[0]


def download_hint(kind: str) -> str:
    """The exact files and repositories that hold a part."""
    original, diffusers, comfy = SOURCES[kind]
    options = [f"{original} of {ORIGINAL}", f"{diffusers} of {ORIGINAL}-Diffusers"]
    return "get " + ", or ".join(options + ([f"split_files/{comfy} of {COMFY}"] if comfy else []))


def index_tensors(part: Part) -> dict[str, Entry]:
    """{our name: where it is}, once every tensor is known to be of a plain dtype and to come from one file only."""
    entries: dict[str, Entry] = {}
    for name, entry in part.tensors:
        if entry.dtype not in DTYPES.values() or re.search(r"scale_weight$|scaled_fp8$", entry.key):
            fp16 = SOURCES[part.layout.part][2].replace("1.3B", "14B" if 5120 in entry.shape else "1.3B")
            got = f"{entry.file}: fp8 weights are not supported ({entry.key}, {entry.dtype})"
            raise ValueError(f"{got}, get split_files/{fp16} of {COMFY}")
        other = entries.setdefault(name, entry)
        if other.file != entry.file and {other.key, entry.key} != TIED:
            raise ValueError(f"{other.file} and {entry.file} both hold {name}: remove one, or load from one file only")
    return entries


def build_and_check(part: Part) -> nn.Module:
    """The part's module on the meta device, once the headers alone have shown that the files fill it exactly."""
    kind, where, entries = part.layout.part, part.where, index_tensors(part)
    shapes = {name: entry.shape for name, entry in entries.items()}
    try:
        config = CONFIGS[kind](shapes, part.configs)
    except KeyError as name:
        raise ValueError(f"{where}: tensor {name} is missing{missing_shards(part)}") from None
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}; is its config.json beside it?") from None
    with torch.device("meta"):
        module = MODULES[kind](config)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    bad = [name for name in wanted if name in shapes and shapes[name] != wanted[name]]
    faults = {
        "missing": [name for name in wanted if name not in shapes],
        "unexpected": [f"{entry.key} in {entry.file}" for name, entry in entries.items() if name not in wanted],
        "wrongly shaped": [f"{name} {shapes[name]}, not {wanted[name]}, in {entries[name].file}" for name in bad],
    }
    for fault, names in faults.items():
        if names:
            raise ValueError(f"{where}: {len(names)} tensors {fault}: {abbreviate(names)}{missing_shards(part)}")
    return module


def abbreviate(items: list[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def missing_shards(part: Part) -> str:
    """The files that an index beside a part's shards lists and the disk lacks, as the end of a message."""
    for index in sorted({index for file in part.files for index in file.parent.glob("*.index.json")}):
        listed = set(read_json(index)["weight_map"].values())
        lost = sorted(name for name in listed if not (index.parent / name).exists())
        if lost and listed & {file.name for file in part.files}:
            return f"; {index} also lists {abbreviate(lost)}: get what is not there"
    return ""


def load_weights(module: nn.Module, part: Part, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Read, cast and move one tensor at a time, so that the peak is the module and the mapped pages of one shard."""
    state: dict[str, Tensor] = {}
    for file in part.files:
        names = {entry.key: name for name, entry in part.tensors if entry.file == file}
        for key, tensor in read_tensors(file, names):
            name = names[key]
            target = torch.float32 if part.layout.part == "dit" and keeps_float32(name) else dtype
            tensor = tensor.to(target, copy=True)  # without a copy, overwriting the file would change the model
            low, high = tensor.aminmax()  # both bounds carry a NaN along
            if not (low.isfinite() and high.isfinite()):
                raise ValueError(f"{file}: {key} is not finite as {target}: damaged, or the dtype is too narrow for it")
            if tensor.ndim > 1 and name.endswith("weight") and low == high == 0:
                raise ValueError(f"{file}: {key} is all zero, as if never filled: download or convert it again")
            state.setdefault(name, tensor := tensor.to(device))
            if not tensor.equal(state[name]):
                raise ValueError(f"{file}: {key} differs from another copy of {name}, and the two should be one tensor")
    module.load_state_dict(state, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers()))
    return module.eval().requires_grad_(False)
