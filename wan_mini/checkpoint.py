"""Checkpoint files: which parts of a model they hold, by their headers; and their tensors, one by one."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_mini.errors import MissingFile, UserError
from wan_mini.json_file import parse_json, read_json
from wan_mini.layouts import IGNORED, Layout, detect, download_hint, rename
from wan_mini.other_models import name_gguf, refuse_gguf
from wan_mini.sizes import Configs
from wan_mini.weight_file import CONFIG, INDEX, read_safetensors_header, unpickle

WEIGHT_FILES = (".safetensors", ".pth")
OTHER_FILES = (".pt", ".bin", ".ckpt")  # names that training code gives to what torch.save writes
LOW_NOISE = "low_noise_dit"  # the second transformer of Wan 2.2 A14B; the first one is its "dit"
TIED = {"shared.weight", "encoder.embed_tokens.weight"}  # one tensor that a text encoder may hold under both names
DTYPES = {  # safetensors -> torch; float8 has a scale beside it, see fp8.py
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class TensorHeader(NamedTuple):
    """A tensor in a file, as the file's header describes it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Part:
    """One part of the model as found on disk.

    tensors: of each file in the order of their bytes. names: {key in a file: our name}; a key that is not there
    belongs to no weight. configs: all that may hold what shapes cannot show.
    """

    layout: Layout
    tensors: list[TensorHeader]
    names: dict[str, str]
    configs: Configs

    @property
    def files(self) -> list[Path]:
        """The files that hold the part."""
        return sorted({tensor.file for tensor in self.tensors})

    @property
    def location(self) -> str:
        """The file, or the number of files and their folder, for messages."""
        files = self.files
        if len(files) == 1:
            return str(files[0])
        return f"{len(files)} files in {files[0].parent}"

    def keys(self, file: Path) -> list[str]:
        """Names of a file's tensors, in the order of their bytes."""
        return [tensor.key for tensor in self.tensors if tensor.file == file]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder (or a single weight file) of which all headers are read: {"dit" | "vae" | ...: Part}.

    passed_over: files that look like weights and are no known part, with the reason.
    """

    path: Path
    parts: dict[str, Part]
    passed_over: tuple[str, ...] = ()

    def require(self, kind: str) -> Part:
        """The part of this kind. Raises MissingFile that says where to get it."""
        if kind not in self.parts:
            looked = f" (passed over: {abbreviate(list(self.passed_over))})" if self.passed_over else ""
            raise MissingFile(f"no {kind} in {self.path}{looked}, {name_gguf(self.path)}{download_hint(kind)}")
        return self.parts[kind]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers of a weight file, or of all of them below a folder; files of no known layout are skipped.

    Raises MissingFile if there is no such path, UserError for a broken file.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFile(f"{path} does not exist: give a checkpoint folder or a weight file")
    files = [path]
    passed_over = []
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if not file.is_dir())
        files = [file for file in below if file.suffix in WEIGHT_FILES]
        others = [file for file in below if file.suffix in OTHER_FILES or file.suffix.lower() in WEIGHT_FILES]
        passed_over = [f"{file.name}, not named .safetensors or .pth" for file in others if file not in files]
    tensors: dict[str, list[TensorHeader]] = {}
    configs: dict[str, Configs] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is no regular file: remove it, or put the weights there")
        headers, config = read_header(file)
        layout = detect(tensor.key for tensor in headers)
        if layout is not None:
            kind = _kind(layout.part, str(file).removeprefix(str(path)))
            tensors.setdefault(kind, []).extend(headers)
            configs.setdefault(kind, []).append(config)
        else:
            passed_over.append(f"{file.name}, {_stranger(headers)}")
    parts = {}
    for kind in tensors:
        parts[kind] = _assemble(tensors[kind], configs[kind], path if path.is_dir() else path.parent)
    return Checkpoint(path, parts, tuple(passed_over))


def _stranger(headers: list[TensorHeader]) -> str:
    """Why a file is no part: its tensors have the names of another program, or lie deeper than at its top."""
    if not headers:
        return "which holds no tensors by name"
    return f"whose tensors have other names, such as {headers[0].key}"


def _kind(part: str, name: str) -> str:
    """The kind of part in a file. The two experts of Wan 2.2 differ in nothing but a file's or folder's name."""
    if part == "dit" and re.search(r"low.?noise|transformer_2[/\\]", name, re.IGNORECASE):
        return LOW_NOISE
    return part


def _assemble(tensors: list[TensorHeader], configs: Configs, root: Path) -> Part:
    """Name all tensors of a part at once, and add every config.json beside its files and one folder above.

    root: the folder that was given; what lies above it belongs to something else.
    """
    keys = [tensor.key for tensor in tensors if not re.match(IGNORED, tensor.key)]
    layout = detect(keys)
    assert layout is not None
    beside: set[Path] = set()
    above: set[Path] = set()
    for tensor in tensors:
        folder = tensor.file.absolute().parent
        beside.add(folder)
        if folder != root.absolute():
            above.add(folder.parent)
    for folder in sorted(beside) + sorted(above):
        file = folder / "config.json"
        if file.is_file():
            configs = [*configs, read_json(file, CONFIG)]
    return Part(layout, tensors, rename(layout, keys), configs)


def index_tensors(part: Part) -> dict[str, TensorHeader]:
    """{our name: where it is}, once every tensor is known to be of a float dtype and to come from one file only.

    Raises UserError on weights of another dtype, and on two files that hold the same tensor.
    """
    index: dict[str, TensorHeader] = {}
    for tensor in part.tensors:
        if tensor.key not in part.names:
            continue  # the tokenizer's bytes
        if tensor.dtype not in DTYPES.values():
            got = f"{tensor.file}: {tensor.key} holds {tensor.dtype}, not one of {', '.join(DTYPES.values())}"
            raise UserError(f"{got}: {download_hint(part.layout.part)}")
        name = part.names[tensor.key]
        other = index.setdefault(name, tensor)
        if other.file != tensor.file and {other.key, tensor.key} != TIED:
            files = f"{other.file} and {tensor.file}"
            raise UserError(f"{files} both hold {name}: remove one, or load from one file only")
    return index


def abbreviate(items: list[str]) -> str:
    """The first three, and how many more there are."""
    text = ", ".join(items[:3])
    if len(items) > 3:
        text += f" and {len(items) - 3} more"
    return text


def missing_shards(part: Part) -> str:
    """The files that an index beside a part's shards lists and the disk lacks, as the end of a message."""
    present = {file.name for file in part.files}
    indices: set[Path] = set()
    for file in part.files:
        indices.update(file.parent.glob("*.index.json"))
    for index in sorted(indices):
        try:
            listed = set(read_json(index, INDEX)["weight_map"].values())
        except UserError as problem:
            return f"; and {problem}"
        lost = sorted(name for name in listed if not (index.parent / name).exists())
        if lost and listed & present:
            return f"; {index} also lists {abbreviate(lost)}: get what is not there"
    return ""


def read_header(file: Path) -> tuple[list[TensorHeader], dict[str, Any]]:
    """A file's tensors without their data, in the order of their bytes, and the `config` in its metadata.

    Raises UserError if the file cannot be read.
    """
    refuse_gguf(file)
    if file.suffix == ".pth":
        tensors = []
        for key, tensor in _unpickle(file).items():
            tensors.append(TensorHeader(file, key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
        return tensors, {}
    header, metadata = read_safetensors_header(file)
    config = parse_json(metadata.get("config", "{}"), f"{file}: config", CONFIG)
    try:
        with safe_open(file, "pt"):  # checks that the tensors fill the file without gaps
            pass
    except (SafetensorError, ValueError) as problem:
        raise UserError(f"{file} cannot be read, is it truncated? Download it again ({problem})") from None
    tensors = []
    for key, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = DTYPES.get(tensor["dtype"], tensor["dtype"])
        tensors.append(TensorHeader(file, key, tuple(tensor["shape"]), dtype))
    return tensors, config


def read_tensors(file: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, tensor) one by one. The tensors are views of the mapped file: copy what is to be kept."""
    if file.suffix == ".pth":
        tensors = _unpickle(file)
        for key in keys:
            yield key, tensors.pop(key)
        return
    with safe_open(file, "pt") as opened:
        for key in keys:
            yield key, opened.get_tensor(key)


def _unpickle(file: Path) -> dict[str, Tensor]:
    """A .pth's tensors, mapped rather than read. Raises UserError if the file is no zip archive, or as unpickle."""
    if not is_zipfile(file):
        raise UserError(f"{file} cannot be read, {_describe_non_archive(file)}")
    return unpickle(file)


def _describe_non_archive(file: Path) -> str:
    """What a .pth is that torch cannot map, by its first bytes, and what to do."""
    with file.open("rb") as stream:
        start = stream.read(16)
    if start.startswith(b"PK"):
        return "it is a zip archive without its end: download it again"
    if start.startswith(b"\x80"):
        load = f"torch.load({str(file)!r}, weights_only=True)"
        return f"it is a pickle from before torch 1.6, not a zip archive: convert it with torch.save({load}, NEW_FILE)"
    if start.startswith(b"version https://"):
        return "it is a Git LFS pointer, not the weights: run git lfs pull, or download the file itself"
    if start.lstrip().startswith(b"<"):
        return "it is a web page, not the weights: download the file itself"
    return f"it is no zip archive as torch.save writes, it begins with {start!r}: download it again"
