"""Which clip and which versions a result came from; the hashes of the weights are Wan.hashes."""

import hashlib
import platform
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

PACKAGE = "fastvmt-mini"


def sha256_clip(frames: np.ndarray) -> str:
    """SHA-256 of a clip's pixels, whatever file they came from. frames (T,H,W,3) uint8."""
    return hashlib.sha256(frames.tobytes()).hexdigest()


def package_version() -> str:
    """Version of this program: pyproject.toml's in a source checkout, else the installed package's."""
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if pyproject.exists():
        return re.findall(r'^version = "(.+?)"', pyproject.read_text(encoding="utf-8"), re.MULTILINE)[0]
    return version(PACKAGE)


def versions() -> dict[str, str]:
    """Versions of this program, of Python and of the five packages."""
    found = {PACKAGE: package_version(), "python": platform.python_version(), "torch": torch.__version__}
    for name in ("safetensors", "numpy", "pillow", "tqdm"):
        found[name] = version(name)
    return found
