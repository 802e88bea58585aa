"""Checkpoints that look like Wan 2.1 text-to-video and are something else: what they are, in words."""

import re
from pathlib import Path

from wan_mini.errors import UserError
from wan_mini.sizes import Shapes

# What only a model of this kind has among its tensors, under either naming.
KINDS = {
    "VACE (video editing with a control branch)": r"vace_",
    "S2V (speech to video)": r"(casual_audio_encoder|audio_injector)\.",
    "Wan-Animate": r"(face_adapter|face_encoder|motion_encoder|pose_patch_embedding)\.",
    "an image-to-video model (I2V or FLF2V)": r"(img_emb|condition_embedder\.image_embedder"
    r"|blocks\.\d+\.(cross_attn\.k_img|(cross_attn|attn2)\.add_k_proj))\.",
    "a camera or control model (Fun)": r"(control_adapter|ref_conv)\.",
    "the VAE of Wan 2.2's 5B model": r"(en|de)coder\.(down|up)samples\.\d+\.(down|up)samples\.",
}
CHANNELS_5B = 48  # of TI2V-5B's latents
ADVICE = "only text-to-video models of Wan 2.1, and of Wan 2.2 A14B, can be loaded"


def refuse_other_models(location: str, shapes: Shapes) -> None:
    """Raises UserError that says what a part is if it is of another kind of model. shapes: {our name: shape}."""
    for kind, pattern in KINDS.items():
        if any(re.match(pattern, name) for name in shapes):
            raise UserError(f"{location} is {kind}: {ADVICE}")
    if "patch_embedding.weight" in shapes and "head.head.weight" in shapes:
        _check_channels(location, shapes)
    elif shapes.get("conv2.weight", (0,))[0] == CHANNELS_5B:
        raise UserError(f"{location} is the VAE of Wan 2.2's 5B model ({CHANNELS_5B} channels): {ADVICE}")


def _check_channels(location: str, shapes: Shapes) -> None:
    """Raises UserError on a DiT that takes other latents than it gives, or those of 5B."""
    if len(shapes["patch_embedding.weight"]) != 5 or len(shapes["head.head.weight"]) != 2:
        return  # of no DiT; said where sizes are read
    _, taken, *patch = shapes["patch_embedding.weight"]
    volume = 1
    for size in patch:
        volume *= size
    given = shapes["head.head.weight"][0] // volume
    if taken == given == CHANNELS_5B:
        raise UserError(f"{location} is TI2V-5B of Wan 2.2 ({taken} channels, another VAE): {ADVICE}")
    if taken != given:
        what = f"takes {taken} channels and gives {given}, so it is an image-to-video or control model"
        raise UserError(f"{location} {what}: {ADVICE}")


def refuse_gguf(path: Path) -> None:
    """Raises UserError if a file is in GGUF, whatever its name."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == b"GGUF" or path.suffix == ".gguf":
        raise UserError(f"{path} is a GGUF file (weights quantized in blocks), which cannot be read here: {ADVICE}")


def name_gguf(path: Path) -> str:
    """The beginning of a message about a folder whose weights are GGUF files; "" for any other."""
    files = sorted(path.rglob("*.gguf"))
    if not files:
        return ""
    return f"{files[0].name} is a GGUF file, which cannot be read here: "
