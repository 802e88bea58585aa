"""Which clip and which versions a result came from; the hashes of the weights are Wan.hashes."""

import hashlib
import platform
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

PACKAGE = "fastvmt-mini"
# What every generated file says. The address is IPTC's term for media made by a trained model; C2PA uses the same.
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
GENERATED = {"ai_generated": True, "digital_source_type": SOURCE_TYPE}
XMP_KEYWORD = "XML:com.adobe.xmp"  # of PNG's text chunk
XMP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"/></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""


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
    numbers = {PACKAGE: package_version(), "python": platform.python_version(), "torch": torch.__version__}
    for name in ("safetensors", "numpy", "pillow", "tqdm"):
        numbers[name] = version(name)
    return numbers
