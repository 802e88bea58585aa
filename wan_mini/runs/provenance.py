"""Which files and versions a result came from."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from wan_mini.checkpoint import find_parts


def sha256_file(file: Path) -> str:
    """SHA-256 of a file, read in pieces: it may be larger than the memory."""
    sha256 = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(2**24):
            sha256.update(piece)
    return sha256.hexdigest()


def checkpoint_hashes(model: Path) -> dict[str, str]:
    """SHA-256 of each weight file of a checkpoint folder."""
    files = sorted({file for part in find_parts(model).values() for file in part.files})
    return {str(file.relative_to(model)): sha256_file(file) for file in tqdm(files, desc="hash", unit="file")}


def versions() -> dict[str, str]:
    """Versions of Python and of the five packages."""
    others = {name: version(name) for name in ("safetensors", "numpy", "pillow", "tqdm")}
    return {"python": platform.python_version(), "torch": torch.__version__, **others}
