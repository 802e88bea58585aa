"""The same models as diffusers builds them, with our weights: what most people run."""

from typing import Any

import torch
from torch import nn

from wan_mini.dit import WanDiT
from wan_mini.layouts import detect, rename
from wan_mini.vae import WanVAE

# Norm of the difference of two outputs over the norm of one, at most.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def diffusers_dit(ours: WanDiT, device: torch.device, dtype: torch.dtype) -> Any:
    """WanTransformer3DModel with the weights of ours; None where diffusers is not installed."""
    c = ours.config
    sizes = {
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.dim // c.num_heads,
        "ffn_dim": c.ffn_dim,
        "num_layers": c.num_layers,
        "text_dim": c.text_dim,
        "freq_dim": c.freq_dim,
        "in_channels": c.in_dim,
        "out_channels": c.out_dim,
        "patch_size": c.patch_size,
    }
    return build_with_weights("WanTransformer3DModel", sizes, ours, device, dtype)


def diffusers_vae(ours: WanVAE, device: torch.device, dtype: torch.dtype) -> Any:
    """AutoencoderKLWan with the weights of ours; None where diffusers is not installed."""
    c = ours.config
    sizes = {
        "base_dim": c.dim,
        "z_dim": c.z_dim,
        "dim_mult": list(c.dim_mult),
        "num_res_blocks": c.num_res_blocks,
        "latents_mean": list(c.mean),
        "latents_std": list(c.std),
    }
    return build_with_weights("AutoencoderKLWan", sizes, ours, device, dtype)


def build_with_weights(
    name: str, sizes: dict[str, Any], ours: nn.Module, device: torch.device, dtype: torch.dtype
) -> Any:
    """Diffusers' class of that name with our weights, in the dtypes that its from_pretrained would give them."""
    try:
        import diffusers  # here, as it takes seconds, and not every machine has it
    except ImportError:
        return None
    with device:
        theirs = getattr(diffusers, name)(**sizes)
    in_float32 = set(theirs._keep_in_fp32_modules or ())
    our_weights = ours.state_dict()
    layout = detect(theirs.state_dict())
    assert layout is not None, f"diffusers changed its names of {name}"
    our_names = rename(layout, theirs.state_dict())  # {their name: ours}
    state = {}
    for their_name, our_name in our_names.items():
        kept = in_float32 & set(their_name.split("."))
        state[their_name] = our_weights[our_name].to(torch.float32 if kept else dtype)
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.eval().requires_grad_(False)
