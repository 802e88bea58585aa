"""What both programs share: devices, stages, files of a run, arguments, and errors in one line."""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from wan_mini.layouts import find_parts

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


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that new tensors may take; None for a CPU, which shares its memory with everything else."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, but unused
    return torch.cuda.mem_get_info(device)[0] + cached


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A second queue of work for a GPU; None for other devices, which have one."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Stages:
    """Seconds (summed) and peak memory of each named stage of a run, for its report."""

    def __init__(self, device: torch.device):
        self.device, self.table = device, {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the block; device work is finished before the clock stops."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds, peak = time.perf_counter() - start, self.peak_gb()
        before = self.table.get(name, {"seconds": 0.0, "peak_gb": peak})
        peak = None if peak is None else max(peak, before["peak_gb"])
        self.table[name] = {"seconds": round(before["seconds"] + seconds, 3), "peak_gb": peak}

    def peak_gb(self) -> float | None:
        """Most device memory (10^9 bytes) since the stage began; on a CPU the process's most so far, where known."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)
        try:
            import resource  # not on Windows
        except ImportError:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def check_finite(latents: Tensor, step: int, steps: int) -> None:
    """Raises FloatingPointError that names the step if latents hold NaN or infinity."""
    if not torch.isfinite(latents).all():
        hint = "try --dtype float32, a lower learning rate, or check the checkpoint with python -m wan_mini.load"
        raise FloatingPointError(f"latents are not finite after step {step + 1} of {steps}: {hint}")


def check_new_folder(folder: Path) -> Path:
    """The folder, if a run may be written there. Raises ValueError if it holds one already or cannot be made."""
    if (folder / "latents.safetensors").exists():
        raise ValueError(f"{folder} already holds a run: choose another --out")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"cannot write into {folder}, because {there} is not a folder one may write to: choose another"
        )
    return folder


def save_tensors(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write what it takes to decode later, in a folder made for it; the same run gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path, {"settings": json.dumps(settings)})


def load_tensors(path: Path, names: list[str]) -> tuple[list[Tensor], dict[str, Any]]:
    """These tensors and the settings of a save_tensors file. Raises ValueError if it is none, FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the .safetensors file of a run")
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(name) for name in names], json.loads(file.metadata()["settings"])
    except (SafetensorError, TypeError, KeyError) as problem:
        raise ValueError(f"{path} holds no run's {' and '.join(names)} ({problem})") from None


def digest(file: Path) -> str:
    """SHA-256 of a file, read in pieces: it may be larger than the memory."""
    sha256 = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(2**24):
            sha256.update(piece)
    return sha256.hexdigest()


def digests(model: Path) -> dict[str, str]:
    """SHA-256 of each weight file of a checkpoint folder."""
    files = sorted({file for part in find_parts(model).values() for file in part.files})
    return {str(file.relative_to(model)): digest(file) for file in tqdm(files, desc="hash", unit="file")}


def versions() -> dict[str, str]:
    """Versions of Python and of the five packages."""
    others = {name: version(name) for name in ("safetensors", "numpy", "pillow", "tqdm")}
    return {"python": platform.python_version(), "torch": torch.__version__, **others}


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (see --help)\n")


def height_width(text: str) -> tuple[int, int]:
    """Parse "480x832", height first, for argparse."""
    try:
        height, width = (int(number) for number in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"size must be HEIGHTxWIDTH such as 480x832, got {text}") from None
    return height, width


def parse_knobs(base: Any, texts: list[str], flag: str = "--set") -> dict[str, Any]:
    """Parse NAME=VALUE for fields of a dataclass, each with the type of its value in `base`; tuples as 3,4.

    Raises ValueError, which names the flag, on an unknown name or a value of another type.
    """
    knobs = {}
    names = [f.name for f in fields(base)]
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names or not value:
            raise ValueError(f"{flag} needs NAME=VALUE with one of {', '.join(names)}, got {text}")
        default = getattr(base, name)
        try:
            if isinstance(default, tuple):
                knobs[name] = tuple(type(n)(part) for n, part in zip(default, value.split(","), strict=True))
            else:
                knobs[name] = int(value) if default is None else type(default)(value)
        except ValueError:
            raise ValueError(f"{flag} {name} needs a value like {default}, got {value}") from None
    return knobs


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Let torch.compile make a transformer's `blocks` faster, in place; options are torch.compile's.

    All share one code, and one more for gradients. It is compiled when a block first runs, in a minute or so, and kept
    on disk for the next process.
    """
    for block in model.blocks:
        block.compile(dynamic=False, **options)


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Call a program's main: exit code 0, or 2 with one line on stderr for what its user can mend."""
    try:
        main(argv)
    except (ValueError, OSError, FloatingPointError) as problem:
        print("error:", " ".join(str(problem).split("\n")), file=sys.stderr)
        return 2
    except RuntimeError as problem:
        if "BackendCompilerFailed" in {kind.__name__ for kind in type(problem).__mro__}:
            why = " ".join(str(problem).splitlines()[:2])
            print(f"error: cannot compile here, run without --compile ({why})", file=sys.stderr)
            return 2
        if not isinstance(problem, torch.OutOfMemoryError) and "can't allocate memory" not in str(problem):
            raise  # a bug, whose traceback is wanted
        print(f"error: out of memory, try --offload or a smaller clip ({str(problem).split('. ')[0]})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
