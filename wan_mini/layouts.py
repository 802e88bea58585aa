"""Names of the published checkpoints: which part a file holds, what we call its tensors, and where it is published.

A file is identified by the tensor names inside, never by its own name: mirrors rename files.
Our names are the original's (Wan-Video/Wan2.1), so each other naming needs one rename table.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

PREFIX = r"^(model\.)?diffusion_model\."  # some single-file DiTs are cut out of a larger checkpoint
LORA = r"\.(lora_(A|B|up|down)(\.\w+)*|diff(_[bm])?)$"  # what only the names of a LoRA file end in
# No weights: the tokenizer's bytes beside Comfy-Org's text encoder, and what belongs to 8-bit weights (fp8.py).
IGNORED = r"^(spiece_model|(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|comfy_quant))$"

# Repositories on Hugging Face.
ORIGINAL = "Wan-AI/Wan2.1-T2V-1.3B"
DIFFUSERS = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
COMFY = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"


class Source(NamedTuple):
    """Where a part is published: a file of ORIGINAL, a folder of DIFFUSERS, and a file of COMFY ("" if it has none)."""

    original: str
    diffusers: str
    comfy: str


SOURCES = {
    "dit": Source(
        "diffusion_pytorch_model.safetensors",
        "transformer/",
        "split_files/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",
    ),
    "vae": Source(
        "Wan2.1_VAE.pth",
        "vae/",
        "split_files/vae/wan_2.1_vae.safetensors",
    ),
    "text_encoder": Source(
        "models_t5_umt5-xxl-enc-bf16.pth",
        "text_encoder/",
        "split_files/text_encoders/umt5_xxl_fp16.safetensors",
    ),
    "tokenizer": Source("google/umt5-xxl/tokenizer.json", "tokenizer/", ""),
}


def download_hint(kind: str) -> str:
    """The exact files and repositories that hold a part, as the end of an error message."""
    source = SOURCES[kind]
    hint = f"get {source.original} of {ORIGINAL}, or {source.diffusers} of {DIFFUSERS}"
    if source.comfy:
        hint += f", or {source.comfy} of {COMFY}"
    return hint


class Layout(NamedTuple):
    """One naming of one part of the model.

    part: "dit", "vae" or "text_encoder". naming: who names the tensors so. marker: a regular expression for the
    beginning of names that only this layout has. starts, inner: {their words: our words}, where words are whole parts
    of a name between dots; `starts` holds at the beginning of a name, `inner` anywhere. Where two rows of a table
    fit, the longer one holds, so the order of the rows does not matter.
    """

    part: str
    naming: str
    marker: str
    starts: dict[str, str]
    inner: dict[str, str]


# The first layout that matches counts. `patch_embedding` has the same name in both DiT layouts: Diffusers' comes first.
LAYOUTS = (
    Layout(
        "dit",
        "Diffusers",
        r"^(condition_embedder|proj_out|scale_shift_table|blocks\.\d+\.(attn[12]|scale_shift_table|ffn\.net))(\.|$)",
        starts={
            "condition_embedder.time_embedder.linear_1": "time_embedding.0",
            "condition_embedder.time_embedder.linear_2": "time_embedding.2",
            "condition_embedder.time_proj": "time_projection.1",
            "condition_embedder.text_embedder.linear_1": "text_embedding.0",
            "condition_embedder.text_embedder.linear_2": "text_embedding.2",
            "proj_out": "head.head",
            "scale_shift_table": "head.modulation",
        },
        inner={
            "scale_shift_table": "modulation",
            "attn1": "self_attn",
            "attn2": "cross_attn",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "to_out.0": "o",
            "norm2": "norm3",  # the norm before cross-attention: the original numbers it last, Diffusers in order
            "ffn.net.0.proj": "ffn.0",
            "ffn.net.2": "ffn.2",
        },
    ),
    Layout(
        "dit",
        "original",
        r"^((patch|text|time)_embedding|time_projection|head|blocks\.\d+\.(self_attn|cross_attn|modulation|ffn\.[02]))"
        r"(\.|$)",
        starts={},
        inner={},
    ),
    Layout(
        "vae",
        "Diffusers",
        r"^(((en|de)coder\.(conv_in|conv_out|norm_out|mid_block|down_blocks|up_blocks))|(post_)?quant_conv)\.",
        starts={
            "quant_conv": "conv1",
            "post_quant_conv": "conv2",
        },
        inner={  # and decoder.up_blocks, see _decoder_rows
            "norm1": "residual.0",
            "conv1": "residual.2",
            "norm2": "residual.3",
            "conv2": "residual.6",
            "conv_shortcut": "shortcut",
            "conv_in": "conv1",
            "norm_out": "head.0",
            "conv_out": "head.2",
            "down_blocks": "downsamples",
            "mid_block.resnets.0": "middle.0",
            "mid_block.attentions.0": "middle.1",
            "mid_block.resnets.1": "middle.2",
        },
    ),
    Layout("vae", "original", r"^(en|de)coder\.(conv1|head|middle|downsamples|upsamples)\.", {}, {}),
    Layout(
        "text_encoder",
        "Hugging Face",
        r"^(shared|encoder\.(embed_tokens|block|final_layer_norm))\.",
        starts={
            "shared": "token_embedding",  # one tied tensor with the next: a file holds either or both
            "encoder.embed_tokens": "token_embedding",
            "encoder.final_layer_norm": "norm",
            "encoder.block": "blocks",
        },
        inner={
            "layer.0.layer_norm": "norm1",
            "layer.0.SelfAttention": "attn",
            "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
            "layer.1.layer_norm": "norm2",
            "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
            "layer.1.DenseReluDense.wi_1": "ffn.fc1",
            "layer.1.DenseReluDense.wo": "ffn.fc2",
        },
    ),
    Layout(
        "text_encoder", "original", r"^(token_embedding|blocks\.\d+\.(attn|pos_embedding|ffn\.(gate|fc[12])))\.", {}, {}
    ),
)


def detect(keys: Iterable[str]) -> Layout | None:
    """The layout that has any of these tensor names, or None; a LoRA file has none."""
    names = [re.sub(PREFIX, "", key) for key in keys]
    if any(re.search(LORA, name) for name in names):
        return None
    for layout in LAYOUTS:
        if any(re.match(layout.marker, name) for name in names):
            return layout
    return None


def rename(layout: Layout, keys: Iterable[str]) -> dict[str, str]:
    """{tensor name in the file: our name} of all tensors of one part; a name that no row fits stays as it is."""
    names = {key: re.sub(PREFIX, "", key) for key in keys}
    if layout.naming == "original":
        return names
    inner = layout.inner | _decoder_rows(names.values())
    for key, name in names.items():
        names[key] = _replace(name, layout.starts, inner)
    return names


def _replace(name: str, starts: dict[str, str], inner: dict[str, str]) -> str:
    """Apply a table's rows to one name. What a row has put there is not replaced again."""
    start = _words(starts).match(name)
    if start is None:
        return _words(inner).sub(lambda match: inner[match[0]], name)
    rest = name[start.end() :]
    return starts[start[0]] + _words(inner).sub(lambda match: inner[match[0]], rest)


def _words(rows: dict[str, str]) -> re.Pattern[str]:
    """A pattern that finds the words of any row between dots, the longest first."""
    longest_first = sorted(rows, key=len, reverse=True)
    either = "|".join(map(re.escape, longest_first))
    return re.compile(rf"(?<![^.])({either})(?![^.])")


def _decoder_rows(names: Iterable[str]) -> dict[str, str]:
    """Rows for the blocks of Diffusers' VAE decoder, {"up_blocks.1.resnets.0": "upsamples.4", ...}."""
    blocks = re.findall(r"\bup_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", "\n".join(names))
    resnets = 1 + max((int(index) for _, kind, index in blocks if kind == "resnets"), default=-1)
    rows = {}
    for stage, kind, index in blocks:
        position = int(index) if kind == "resnets" else resnets  # the upsampling closes its stage
        number = decoder_block_number(int(stage), position, resnets)
        rows[f"up_blocks.{stage}.{kind}.{index}"] = f"upsamples.{number}"
    return rows


def decoder_block_number(stage: int, position: int, resnets: int) -> int:
    """The original's number of a decoder block: it counts through all stages, each of `resnets` and one upsampling."""
    return stage * (resnets + 1) + position
