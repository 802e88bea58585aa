"""Which files and versions a result came from."""

import hashlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

PACKAGE = "fastvmt-mini"


def sha256_file(file: Path) -> str:
    """SHA-256 of a file, read in pieces: it may be larger than the memory."""
    sha256 = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(2**24):
            sha256.update(piece)
    return sha256.hexdigest()


def sha256_clip(frames: np.ndarray) -> str:
    """SHA-256 of a clip's pixels, whatever file they came from. frames (T,H,W,3) uint8."""
    return hashlib.sha256(frames.tobytes()).hexdigest()


def package_version() -> str:
    """Version of this program: the installed package's, or pyproject.toml's in a source checkout."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.exists():
        match = re.search(r'^version = "(.+)"$', project.read_text(encoding="utf-8"), re.M)
        if match:
            return match[1]
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of this program, of Python and of the five packages."""
    found = {PACKAGE: package_version(), "python": platform.python_version(), "torch": torch.__version__}
    for name in ("safetensors", "numpy", "pillow", "tqdm"):
        found[name] = version(name)
    return found
