"""Which versions a result came from; the hashes of the weights are Wan.hashes."""

import platform
from importlib.metadata import version

import torch

from wan_mini.hashes import sha256_file as sha256_file


def versions() -> dict[str, str]:
    """Versions of Python and of the five packages."""
    others = {name: version(name) for name in ("safetensors", "numpy", "pillow", "tqdm")}
    return {"python": platform.python_version(), "torch": torch.__version__, **others}
