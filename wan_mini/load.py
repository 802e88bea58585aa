"""Load Wan 2.1 from any of its published checkpoints, or refuse in one line.

    load_wan(folder, device=device, dtype=dtype)    # the whole model
    load_dit(path, ...), load_vae, load_text_encoder, load_tokenizer    # one part
    build_from_folder(folder), build_preset(name)    # parts without weights, to estimate memory

A wrong weight rarely crashes; it makes a worse video. So loading is strict: every tensor of a module comes from exactly
one place, has the right shape, is finite, and no weight matrix is all zero. `python -m wan_mini.inspect` says what is
in a folder.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan_mini.build import MODULES, build_and_check
from wan_mini.checkpoint import LOW_NOISE, Checkpoint, Part, read_checkpoint, read_tensors
from wan_mini.config import T2V_1_3B, T2V_14B, TINY, TINY_UMT5, TINY_VAE, UMT5_XXL, WAN_VAE
from wan_mini.device.host import pieces
from wan_mini.device.memory import set_weight_dtypes
from wan_mini.dit import WanDiT, keeps_float32
from wan_mini.errors import MissingFile, UserError
from wan_mini.experts import A14B, Experts, boundary_of, check_both_experts, loras_for, parts_of
from wan_mini.fp8 import read_scales
from wan_mini.hashes import FileHasher, sha256_file
from wan_mini.layouts import download_hint
from wan_mini.lora_files import Changes, LoraFile, read_loras
from wan_mini.noise import start_noise
from wan_mini.sizes import check_fit
from wan_mini.tokenizer import Tokenizer
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

NAMES = {T2V_1_3B: "Wan2.1-T2V-1.3B", T2V_14B: "Wan2.1-T2V-14B", TINY: "tiny"}
PRESETS: dict[str, dict[str, Any]] = {
    "Wan2.1-T2V-1.3B": {"dit": T2V_1_3B, "vae": WAN_VAE, "text_encoder": UMT5_XXL},
    "Wan2.1-T2V-14B": {"dit": T2V_14B, "vae": WAN_VAE, "text_encoder": UMT5_XXL},
    "tiny": {"dit": TINY, "vae": TINY_VAE, "text_encoder": TINY_UMT5},
}


@dataclass(frozen=True)
class Wan:
    """A whole model, ready to run: modules in eval mode, without gradients.

    dit: two of them behind one (Experts) in Wan 2.2 A14B.
    name: "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.2-T2V-A14B", "tiny" or "custom".
    folder: where it was loaded from, if from a folder.
    hashes: {weight file relative to the folder: SHA-256}, empty unless load_wan hashed them.
    """

    dit: WanDiT
    vae: WanVAE
    text_encoder: UMT5Encoder
    tokenizer: Tokenizer
    name: str
    folder: Path | None = None
    hashes: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.dit.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the transformer's matrix products run."""
        return self.dit.patch_embedding.weight.dtype

    def start_noise(self, shape: Sequence[int], seed: int, key: str = "") -> Tensor:
        """The noise of this model's run with a seed and a key, see noise.start_noise."""
        return start_noise(shape, seed, key, self.name)


def load_wan(
    folder: str | Path | Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    hash_files: bool = True,
    loras: Sequence[LoraFile] = (),
    on_demand: bool = False,
) -> Wan:
    """Load a checkpoint folder of any layout, or one whose headers read_checkpoint has read.

    dtype is for the DiT (but for what keeps float32) and the text encoder. The VAE is always float32, because encoding
    in bfloat16 shifts trajectories. All headers are checked before any weight is read. hash_files: fill Wan.hashes,
    from what is read anyway or from a cache. loras: files that are merged into the DiT's weights. on_demand: read a
    part's weights each time that offload.on_device asks for them, so that one part is in memory.
    Raises MissingFile for a missing part and UserError for a bad one.
    """
    checkpoint = _open_folder(folder)
    tokenizer = load_tokenizer(checkpoint.path)
    modules = _build_all(checkpoint)
    hasher = FileHasher() if hash_files else None
    hashes: dict[str, str] = {}
    set_weight_dtypes(modules, dtype)

    def read(kind: str) -> None:
        part_dtype = torch.float32 if kind == "vae" else dtype
        for part, member in parts_of(kind, modules[kind]):
            changes = read_loras(loras_for(part, loras), member) if kind == "dit" else {}
            load_weights(member, checkpoint.parts[part], device, part_dtype, hasher, changes)
        if hasher is not None:
            for file, digest in sorted(hasher.digests.items()):
                hashes[file.relative_to(checkpoint.path).as_posix()] = digest
            for number, lora in enumerate(loras, start=1):  # two of them may have one name
                hashes[f"lora {number}: {lora.path.name}"] = sha256_file(lora.path)

    for kind, module in modules.items():
        if on_demand:
            module.read_weights = partial(read, kind)  # type: ignore[assignment]
        else:
            read(kind)
    parts: Any = modules
    return Wan(**parts, tokenizer=tokenizer, name=_model_name(modules), folder=checkpoint.path, hashes=hashes)


def build_from_folder(folder: str | Path | Checkpoint) -> tuple[str, dict[str, nn.Module]]:
    """Name and parts of a checkpoint folder, on the meta device: from its headers, no weight is read.

    Give a read_checkpoint(folder) to this and to load_wan, and the headers are read once. Raises as load_wan.
    """
    checkpoint = _open_folder(folder)
    modules = _build_all(checkpoint)
    return _model_name(modules), modules


def build_preset(name: str) -> tuple[str, dict[str, nn.Module]]:
    """Name and parts of a published model, on the meta device. Raises MissingFile on a name that is not in PRESETS."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise MissingFile(f"{name} does not exist: give a checkpoint folder, {download_hint('dit')}, or one of {known}")
    modules = {}
    with torch.device("meta"):
        for kind, config in PRESETS[name].items():
            modules[kind] = MODULES[kind](config)
    return name, modules


def load_dit(
    path: str | Path, *, device: torch.device | str, dtype: torch.dtype, loras: Sequence[LoraFile] = ()
) -> WanDiT:
    """Load the DiT from a file or a checkpoint folder; its float32 parameters stay so. Raises as load_wan.

    Of two experts it is the high-noise one.
    """
    return cast(WanDiT, _load_part("dit", path, device, dtype, loras))


def load_vae(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> WanVAE:
    """Load the VAE from a file or a checkpoint folder. Raises as load_wan."""
    return cast(WanVAE, _load_part("vae", path, device, dtype))


def load_text_encoder(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> UMT5Encoder:
    """Load the text encoder from a file or a checkpoint folder. Raises as load_wan."""
    return cast(UMT5Encoder, _load_part("text_encoder", path, device, dtype))


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


def find_tokenizer(path: Path) -> Path:
    """The only tokenizer.json below a folder, or the file itself. Raises MissingFile, or UserError on two."""
    files = [path]
    if path.is_dir():
        files = sorted(path.rglob("tokenizer.json"))
    if not files or not files[0].exists():
        raise MissingFile(f"no tokenizer in {path}, {download_hint('tokenizer')}")
    if len(files) > 1:
        raise UserError(f"{files[0]} and {files[1]} are both tokenizers: keep one of them")
    return files[0]


def _open_folder(folder: str | Path | Checkpoint) -> Checkpoint:
    """The headers of a folder, unless they are read already. Raises MissingFile if it is no folder."""
    path = Path(folder.path if isinstance(folder, Checkpoint) else folder)
    if not path.is_dir():
        hint = f"{download_hint('dit')}, with its other files, and give their folder"
        raise MissingFile(f"no folder {path}: {hint}")
    if isinstance(folder, Checkpoint):
        return folder
    return read_checkpoint(path)


def _load_part(
    kind: str, path: str | Path, device: torch.device | str, dtype: torch.dtype, loras: Sequence[LoraFile] = ()
) -> nn.Module:
    """Find, check and read one part."""
    part = read_checkpoint(path).require(kind)
    module = build_and_check(part)
    return load_weights(module, part, device, dtype, changes=read_loras(loras, module))


def _build_all(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """All parts on the meta device. Raises as load_wan."""
    modules = {}
    for kind in MODULES:
        modules[kind] = build_and_check(checkpoint.require(kind))
    check_both_experts(checkpoint, checkpoint.require("dit"))
    if LOW_NOISE in checkpoint.parts:
        low_noise = build_and_check(checkpoint.require(LOW_NOISE))
        modules["dit"] = Experts(modules["dit"], low_noise, boundary_of(checkpoint))
    check_fit(*[cast(Any, module).config for module in modules.values()])
    return modules


def _model_name(modules: dict[str, nn.Module]) -> str:
    """The name of the published model of this size, or "custom"."""
    name = NAMES.get(cast(WanDiT, modules["dit"]).config, "custom")
    if isinstance(modules["dit"], Experts) and name == "Wan2.1-T2V-14B":
        return A14B
    return name


def load_weights(
    module: nn.Module,
    part: Part,
    device: torch.device | str,
    dtype: torch.dtype,
    hasher: FileHasher | None = None,
    changes: Changes | None = None,
) -> nn.Module:
    """Fill a module on the meta device: read, cast, check and move one tensor at a time.

    So the peak of memory is the module and a piece of a tensor; a whole one if it is changed on the way, by the scales
    of fp8 or by `changes`, what is added to some parameters. Raises UserError on a tensor that is not finite or all
    zero, and on two copies of a tied tensor that differ.
    """
    state: dict[str, Tensor] = {}
    scales = read_scales(part)
    for file in part.files:
        tensors = read_tensors(file, part.keys(file))
        if hasher is not None:
            tensors = hasher.watch(file, tensors)
        for key, tensor in tensors:
            if key not in part.names:
                continue  # the tokenizer's bytes, the scale of an fp8 weight
            name = part.names[key]
            if key in scales:
                tensor = tensor.float() * scales[key]
            for change in (changes or {}).get(name, []):
                tensor = change.added_to(tensor)
            weight = _cast(tensor, f"{file}: {key}", name, _dtype_of(part, name, dtype)).to(device)
            del tensor  # it keeps its file mapped
            if name not in state:
                state[name] = weight
            elif not weight.equal(state[name]):
                raise UserError(f"{file}: {key} differs from another copy of {name}, and the two should be one tensor")
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _dtype_of(part: Part, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a parameter gets: some of the DiT's stay float32."""
    if part.layout.part == "dit" and keeps_float32(name):
        return torch.float32
    return dtype


def _cast(tensor: Tensor, source: str, name: str, dtype: torch.dtype) -> Tensor:
    """A copy, so that overwriting the file does not change the model. Raises UserError as load_weights."""
    weight = torch.empty(tensor.shape, dtype=dtype)
    end = 0
    for piece in pieces(tensor):
        start, end = end, end + len(piece)
        weight.view(-1)[start:end].copy_(piece)
    low, high = weight.aminmax()  # both bounds carry a NaN along
    if not (low.isfinite() and high.isfinite()):
        raise UserError(f"{source} is not finite as {dtype}: damaged, or the dtype is too narrow for it")
    if weight.ndim > 1 and name.endswith("weight") and low == high == 0:
        raise UserError(f"{source} is all zero, as if never filled: download or convert it again")
    return weight
