"""The folder of a run: latents and settings, written once, read again to decode."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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
