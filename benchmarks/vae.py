"""The VAE's encode and decode, beside diffusers' AutoencoderKLWan with the same weights, in float32 as in a transfer.

Both are exact and stream a clip in the same chunks, so only how each convolution is done, and what is kept from chunk
to chunk, can differ. Operations are those of 3D convolutions, counted by torch; on a CPU ours does others.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Bench, difference, parser
from benchmarks.models import Size, copy_weights, diffusers_class, random_inputs, random_module
from wan_mini.vae import WanVAE

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # norm of the difference over the norm


def diffusers_vae(ours: WanVAE, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    """None where there is no diffusers."""
    if (build := diffusers_class("AutoencoderKLWan")) is None:
        return None
    c = ours.config
    sizes = {"base_dim": c.dim, "z_dim": c.z_dim, "dim_mult": list(c.dim_mult), "num_res_blocks": c.num_res_blocks}
    with device:
        theirs = build(**sizes, latents_mean=list(c.mean), latents_std=list(c.std))
    return copy_weights(ours, theirs, dtype)


def count_operations(size: Size, clip: torch.Size) -> dict[str, int]:
    """Of encode and decode, counted on tensors without contents."""
    found = {}
    with torch.device("meta"):
        vae = WanVAE(size.vae)
        for name, shape in (("encode", clip), ("decode", size.latents)):
            with FlopCounterMode(display=False) as counter:
                getattr(vae, name)(torch.zeros(shape))
            found[name] = counter.get_total_flops()
    return found


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure both, compare, print."""
    args = parser(__doc__).parse_args(argv)
    args.dtype = args.dtype or "float32"
    bench = Bench("vae", args)
    c = bench.size.motion
    ours = random_module(WanVAE, bench.size.vae, bench.device, bench.dtype)
    theirs = diffusers_vae(ours, bench.device, bench.dtype)
    z, *_ = random_inputs(bench.size, bench.device)
    clip = torch.rand(1, 3, c.frames, c.height, c.width).to(bench.device) * 2 - 1
    mean, std = ours.statistics(z)
    raw, picture = (z * std + mean).to(bench.dtype), clip.to(bench.dtype)  # diffusers leaves this to its caller
    calls = {
        "encode": (lambda: ours.encode(clip), lambda: theirs.encode(picture).latent_dist.mode()),
        "decode": (lambda: ours.decode(z), lambda: theirs.decode(raw).sample),
    }
    operations = count_operations(bench.size, clip.shape)
    for name, (our_call, their_call) in calls.items():
        if theirs is None:
            bench.skip(f"{name}, diffusers", "not installed")
        else:
            bench.row(f"{name}, diffusers", their_call, operations=operations[name])
        bench.row(f"{name}, ours", our_call, to=f"{name}, diffusers", operations=operations[name])
    if theirs is not None:
        pairs = {name: (our_call(), their_call().float()) for name, (our_call, their_call) in calls.items()}
        pairs["encode"] = pairs["encode"][0], (pairs["encode"][1] - mean) / std
        pairs["decode"] = pairs["decode"][0].clamp(-1, 1), pairs["decode"][1]  # diffusers clamps
        for name, pair in pairs.items():
            error = bench.facts[f"{name}, difference"] = difference(*pair)
            assert error <= TOLERANCE[bench.dtype], f"the two {name} differently: {error}"
    bench.finish()


if __name__ == "__main__":
    main()
