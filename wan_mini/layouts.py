"""What a checkpoint's files hold: their headers, and one rename table per naming that is not the original's.

Files are told apart by the tensor names inside, never by their own names: mirrors rename files.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

PREFIX = r"^(model\.)?diffusion_model\."  # some single-file DiTs are cut out of a larger checkpoint
IGNORED = r"^spiece_model$"  # Comfy-Org keeps the tokenizer's bytes beside the text encoder's weights


class Layout(NamedTuple):
    """One naming of one part: `marker` finds it, `renames` (pattern, replacement), all applied in order, undo it."""

    part: str
    naming: str
    marker: str
    renames: tuple[tuple[str, str], ...] = ()


# The first match wins, and `patch_embedding` has the same name in both DiT layouts: Diffusers' comes first.
LAYOUTS = (
    Layout(
        "dit",
        "Diffusers",
        r"^(condition_embedder|proj_out|scale_shift_table|blocks\.\d+\.(attn[12]|scale_shift_table|ffn\.net))(\.|$)",
        (
            (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
            (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
            (r"^condition_embedder\.time_proj\.", "time_projection.1."),
            (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
            (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
            (r"^proj_out\.", "head.head."),
            (r"^scale_shift_table$", "head.modulation"),
            (r"\.scale_shift_table$", ".modulation"),
            (r"\.attn1\.", ".self_attn."),
            (r"\.attn2\.", ".cross_attn."),
            (r"\.to_([qkv])\.", r".\1."),
            (r"\.to_out\.0\.", ".o."),
            (r"\.norm2\.", ".norm3."),  # the two count norms differently: this one stands before cross-attention
            (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
            (r"\.ffn\.net\.2\.", ".ffn.2."),
        ),
    ),
    Layout(
        "dit",
        "original",
        r"^((patch|text|time)_embedding|time_projection|head|blocks\.\d+\.(self_attn|cross_attn|modulation|ffn\.[02]))"
        r"(\.|$)",
    ),
    Layout(
        "vae",
        "Diffusers",
        r"^(((en|de)coder\.(conv_in|conv_out|norm_out|mid_block|down_blocks|up_blocks))|(post_)?quant_conv)\.",
        (
            (r"\.conv1\.", ".residual.2."),  # inside a residual block; before conv_in takes the name conv1
            (r"\.conv2\.", ".residual.6."),
            (r"\.norm1\.", ".residual.0."),
            (r"\.norm2\.", ".residual.3."),
            (r"\.conv_shortcut\.", ".shortcut."),
            (r"^quant_conv\.", "conv1."),
            (r"^post_quant_conv\.", "conv2."),
            (r"\.conv_in\.", ".conv1."),
            (r"\.norm_out\.", ".head.0."),
            (r"\.conv_out\.", ".head.2."),
            (r"\.down_blocks\.", ".downsamples."),
            (r"\.mid_block\.resnets\.0\.", ".middle.0."),
            (r"\.mid_block\.attentions\.0\.", ".middle.1."),
            (r"\.mid_block\.resnets\.1\.", ".middle.2."),
        ),
    ),
    Layout("vae", "original", r"^(en|de)coder\.(conv1|head|middle|downsamples|upsamples)\."),
    Layout(
        "text_encoder",
        "Hugging Face",
        r"^(shared|encoder\.(embed_tokens|block|final_layer_norm))\.",
        (
            (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),  # one tensor, tied: a file holds either or both
            (r"^encoder\.final_layer_norm\.", "norm."),
            (r"^encoder\.block\.", "blocks."),
            (r"\.layer\.0\.layer_norm\.", ".norm1."),
            (r"\.layer\.1\.layer_norm\.", ".norm2."),
            (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
            (r"\.layer\.0\.SelfAttention\.", ".attn."),
            (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
            (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
            (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
        ),
    ),
    Layout("text_encoder", "original", r"^(token_embedding|blocks\.\d+\.(attn|pos_embedding|ffn\.(gate|fc[12])))\."),
)


def detect(keys: Iterable[str]) -> Layout | None:
    """The layout that has any of these tensor names, or None."""
    keys = [re.sub(PREFIX, "", key) for key in keys]
    return next((layout for layout in LAYOUTS if any(re.match(layout.marker, key) for key in keys)), None)


def rename(layout: Layout, keys: Iterable[str]) -> dict[str, str]:
    """{tensor name in the file: our name} for all tensors of one part; a name that no rule knows stays as it is."""
    plain = {key: re.sub(PREFIX, "", key) for key in keys}
    # Diffusers numbers the decoder's blocks by stage, the original straight through: in sorted order, they agree.
    ups = sorted({m[0] for key in plain.values() if (m := re.match(r"decoder\.up_blocks\.\d\.\w+\.\d\.", key))})
    table = [(re.escape(up), f"decoder.upsamples.{i}.") for i, up in enumerate(ups)] + list(layout.renames)
    for pattern, replacement in table:
        plain = {key: re.sub(pattern, replacement, name) for key, name in plain.items()}
    return plain


# Configurations: shapes tell nearly all; a config that the checkpoint carries tells the rest, else it is the official.
# KeyError: no such tensor. ValueError: neither shapes nor configs tell.
