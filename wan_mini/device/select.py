"""The device, the dtype and the compiler of a run."""

from typing import Any

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str | None = None) -> torch.device:
    """The device asked for, else the best there is: cuda, mps, cpu. Raises ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, available in there.items() if available))
    if not there.get(name.split(":")[0], False):
        usable = ", ".join(kind for kind, available in there.items() if available)
        raise ValueError(f"device {name} is not available here, choose one of: {usable}")
    return torch.device(name)


def pick_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """The dtype asked for, else bfloat16 where the hardware has it natively, else float32.

    An older GPU claims bfloat16 support but emulates it, so its compute capability decides.
    """
    if name is not None:
        return DTYPES[name]
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float32


def has_amx(device: torch.device) -> bool:
    """Whether this is a CPU with matrix units for bfloat16 (Intel AMX), several times as fast as its float32."""
    return device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A second queue of work for a GPU; None for other devices, which have one."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Let torch.compile make a transformer's `blocks` faster, in place; options are torch.compile's.

    All share one code, and one more for gradients. It is compiled when a block first runs, in a minute or so, and kept
    on disk for the next process.
    """
    for block in model.blocks:
        block.compile(dynamic=False, **options)
