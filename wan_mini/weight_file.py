"""What the files of a checkpoint say of themselves, checked before anything is allocated or unpickled."""

import re
import zipfile
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from wan_mini.errors import UserError
from wan_mini.json_file import (
    array,
    boolean,
    file_name,
    integer,
    mapping,
    number,
    optional,
    parse_json,
    record,
    row,
    text,
)

MAX_HEADER = 2**24  # bytes of a safetensors header
MAX_PICKLE = 2**22  # bytes of an archive's pickle, which holds names and shapes only
MAX_TENSORS = 100_000  # of one file
# Bytes of an element; of other dtypes, only safetensors' own checks hold.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1, "BOOL": 1}

_COUNT = integer(1, 2**20)
_STATISTICS = array(number(), 256, 1)
# What a config.json, or the `config` of a header, may say of a part's sizes; whatever else it says is not read.
CONFIG = record(
    {
        "dim": optional(_COUNT),
        "num_heads": _COUNT,
        "num_attention_heads": _COUNT,
        "attention_head_dim": _COUNT,
        "num_layers": _COUNT,
        "text_len": _COUNT,
        "z_dim": _COUNT,
        "mean": _STATISTICS,
        "std": _STATISTICS,
        "latents_mean": _STATISTICS,
        "latents_std": _STATISTICS,
        "vae": record({"mean": _STATISTICS, "std": _STATISTICS}),
    }
)
INDEX = record({"weight_map": mapping(file_name, MAX_TENSORS)}, required=["weight_map"])
_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), boolean)
_TOKEN = {"id": integer(0, 2**20), "content": text(1000, 1), **_FLAGS}
ADDED_TOKENS = array(record(_TOKEN, required=list(_TOKEN)), 10_000)  # of a tokenizer.json, as its vocabulary
VOCAB = array(row(text(1000), number()), 2**20)
_SHAPE = array(integer(0, 2**40), 16)
_TENSOR = {"dtype": text(20, 1), "shape": _SHAPE, "data_offsets": array(integer(0, 2**60), 2, 2)}
_TENSORS = mapping(record(_TENSOR, required=list(_TENSOR)), MAX_TENSORS)
_METADATA = mapping(text(MAX_HEADER), 1000)


def read_safetensors_header(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """{name: {"dtype", "shape", "data_offsets"}} and the metadata of a safetensors file.

    Raises UserError if the header is too long, or its tensors do not lie inside the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER, size - 8):
            stream.seek(0)
            raise UserError(f"{file} cannot be read, {_describe_start(stream.read(32), length, size)}")
        content = stream.read(length)
    header = parse_json(content, f"{file} cannot be read: its header")
    metadata = header.pop("__metadata__", {})
    _METADATA(metadata, f"{file} cannot be read: its header.__metadata__")
    _TENSORS(header, f"{file} cannot be read: its header")
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        expected = end - begin
        if tensor["dtype"] in ITEM_BYTES:
            expected = prod(tensor["shape"]) * ITEM_BYTES[tensor["dtype"]]
        if not begin <= end <= size - 8 - length or end - begin != expected:
            described = (
                f"{name} is {tensor['dtype']} {tensor['shape']} at bytes {begin} to {end} of {size - 8 - length}"
            )
            raise UserError(f"{file} cannot be read, is it truncated? Download it again ({described})")
    return header, metadata


def _describe_start(start: bytes, length: int, size: int) -> str:
    """What a file is that begins like no safetensors file, and what to do."""
    if start.startswith(b"version https://"):
        return "it is a Git LFS pointer, not the weights: run git lfs pull, or download the file itself"
    if start.lstrip().startswith(b"<"):
        return "it is a web page, not the weights: download the file itself"
    if start.startswith((b"PK", b"\x80")):
        return "it is a pickle, not safetensors: name it .pth"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file: get the safetensors version"
    return f"is it truncated? Download it again (a header of {length} bytes in a file of {size})"


def unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of an archive that torch.save has written, mapped rather than read.

    weights_only, because an unrestricted pickle can run any code. Raises UserError if the archive holds more than
    tensors, or tensors that are not in it.
    """
    _check_archive(file)
    try:
        loaded = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    except UnpicklingError as problem:
        asked = re.search(r"GLOBAL (\S+)", str(problem))
        culprit = f" ({asked[1]})" if asked else ""
        raise UserError(
            f"{file} cannot be read: it holds more than tensors, which could run code{culprit}; "
            "get the file from its publisher, or a safetensors version"
        ) from None
    except Exception as problem:  # on broken bytes torch raises RuntimeError, EOFError, KeyError, TypeError and more
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(f"{file} cannot be read, is it truncated? Download it again ({reason})") from problem
    tensors: dict[str, Tensor] = {}
    if isinstance(loaded, dict):
        for key, tensor in loaded.items():
            if isinstance(key, str) and isinstance(tensor, Tensor):
                _check_tensor(file, key, tensor)
                tensors[key] = tensor
    return tensors


def _check_archive(file: Path) -> None:
    """Nothing in it grows while it is read: torch compresses nothing, and its pickle holds only names and shapes."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (
        Exception
    ) as problem:  # on broken bytes zipfile raises BadZipFile, struct.error, NotImplementedError and more
        raise UserError(f"{file} cannot be read, is it truncated? Download it again ({problem})") from problem
    total = 0
    for entry in entries:
        total += entry.file_size
        is_pickle = entry.filename.endswith(".pkl")
        if entry.compress_type != zipfile.ZIP_STORED or (is_pickle and entry.file_size > MAX_PICKLE):
            raise UserError(f"{file} cannot be read: torch.save has not written its {entry.filename}, get another file")
    if total > file.stat().st_size or len(entries) > MAX_TENSORS:
        raise UserError(f"{file} cannot be read: its {len(entries)} entries say more than it holds, get another file")


def _check_tensor(file: Path, key: str, tensor: Tensor) -> None:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise UserError(f"{file} cannot be read: {key} has shape {tuple(tensor.shape)}, but not the data of it")
