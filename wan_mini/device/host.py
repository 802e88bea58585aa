"""The host's memory: how much is free, whether a model's weights fit, and giving back what a loader has read."""

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wan_mini.device.memory import GB, SHARE, set_weight_dtypes, weight_bytes
from wan_mini.errors import UserError

MEMORY_INFO = Path("/proc/meminfo")  # Linux
MADV_DONTNEED = 4  # of Linux's madvise
PIECE = 2**24  # bytes of a mapped file that are held at once


def free_host_memory() -> int | None:
    """Bytes that new tensors may take, what the system would drop from its file cache included; None if unknown."""
    if not MEMORY_INFO.is_file():
        return None
    for line in MEMORY_INFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def fit_dtype(
    parts: Mapping[str, nn.Module], dtype: torch.dtype, device: torch.device, *, offload: str, named: bool
) -> torch.dtype:
    """The dtype in which a model's weights fit into a CPU's memory: the given one, or bfloat16 unless it was named.

    parts: on the meta device, whose dtypes change. A change is printed. Raises UserError if the weights do not fit.
    """
    free = free_host_memory()
    if device.type != "cpu" or free is None:
        return dtype
    choices = [dtype] if named else list(dict.fromkeys((dtype, torch.bfloat16)))
    needed = {}
    for choice in choices:
        set_weight_dtypes(parts, choice)
        needed[choice] = max(weight_bytes(parts, offload).values())
        if needed[choice] <= SHARE * free:
            if choice != dtype:
                print(f"note: weights of {dtype} take {needed[dtype] / GB:.1f} GB, {free / GB:.1f} are free: {choice}")
            return choice
    least = min(needed, key=lambda choice: needed[choice])
    need = f"the weights take {needed[least] / GB:.1f} GB in {least} and {free / GB:.1f} GB of memory are free"
    advice = "--offload, which holds one part at a time" if offload == "none" else "a machine with more"
    if named and dtype != torch.bfloat16:
        advice = "--dtype bfloat16 or " + advice
    raise UserError(f"{need}: try {advice}")


def forget_pages(tensor: Tensor) -> None:
    """Let the system take back the pages of a mapped file that only this tensor has read; they can be read again."""
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # the first whole page
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A mapped tensor's elements in order: (...) -> flat views of at most PIECE bytes, whose pages are given back.

    Nothing else may hold the tensor's memory: if it is no mapped file's, its contents are lost.
    """
    flat = tensor.reshape(-1)  # (...) -> (numel,)
    for piece in flat.split(max(1, PIECE // tensor.element_size())):
        yield piece
        forget_pages(piece)
