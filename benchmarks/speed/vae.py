"""The VAE's encode and decode, beside diffusers' AutoencoderKLWan with the same weights, in float32 without TF32.

Both are exact and process a clip in the same chunks, so only how each convolution is done, and what is kept from chunk
to chunk, can differ. Operations are those of 3D convolutions, counted by torch; on a CPU ours does others.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.bench import Bench, build_parser
from benchmarks.speed.diffusers_models import TOLERANCE, diffusers_vae
from benchmarks.speed.measure import difference
from benchmarks.speed.random_models import Size, random_inputs, random_module
from wan_mini.device.select import exact_float32
from wan_mini.runs.cli import run
from wan_mini.vae import WanVAE


def count_operations(size: Size, clip: torch.Size) -> dict[str, int]:
    """Of encode and decode, counted on meta tensors."""
    counts = {}
    with torch.device("meta"):
        vae = WanVAE(size.vae)
        with FlopCounterMode(display=False) as encode:
            vae.encode(torch.zeros(clip))
        counts["encode"] = encode.get_total_flops()
        with FlopCounterMode(display=False) as decode:
            vae.decode(torch.zeros(size.latents))
        counts["decode"] = decode.get_total_flops()
    return counts


def compare(bench: Bench, ours: WanVAE, theirs: Any, clip: Tensor, latents: Tensor) -> None:
    """Rows of both, and their difference; clip (1,3,T,H,W) in [-1,1], latents (1,16,F,h,w). theirs may be None."""
    mean, std = ours.statistics(latents)
    their_clip = clip.to(bench.dtype)
    their_latents = (latents * std + mean).to(bench.dtype)  # diffusers leaves the statistics to its caller
    calls = {
        "encode": (lambda: ours.encode(clip), lambda: theirs.encode(their_clip).latent_dist.mode()),
        "decode": (lambda: ours.decode(latents), lambda: theirs.decode(their_latents).sample),
    }
    operations = count_operations(bench.size, clip.shape)
    for name, (our_call, their_call) in calls.items():
        reference = f"{name}, diffusers"
        if theirs is None:
            bench.skip(reference, "not installed")
        else:
            bench.row(reference, their_call, operations=operations[name])
        bench.row(f"{name}, ours", our_call, reference=reference, operations=operations[name])
    if theirs is None:
        return
    encode, their_encode = calls["encode"]
    decode, their_decode = calls["decode"]
    errors = {
        "encode": difference(encode(), (their_encode().float() - mean) / std),
        "decode": difference(decode().clamp(-1, 1), their_decode()),  # diffusers clamps
    }
    for name, error in errors.items():
        bench.results[f"{name}, difference"] = error
        assert error <= TOLERANCE[bench.dtype], f"the two {name} differently: {error}"


def time_decoding(bench: Bench, ours: WanVAE, latents: Tensor) -> None:
    """Rows of decoding as a bfloat16 run does it, and the same with the channels of a position side by side."""
    exact = ours.decode(latents)
    channels_last = deepcopy(ours)
    for parameter in channels_last.parameters():
        if parameter.ndim == 5:  # a 3D convolution's: its output is laid out like its weight
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
    for name, vae in (("bfloat16", ours), ("bfloat16, channels last", channels_last)):

        def call(vae: WanVAE = vae) -> Tensor:
            with torch.autocast(bench.device.type, torch.bfloat16):
                return vae.decode(latents)

        bench.row(f"decode, {name}", call, reference="decode, ours")
        error = difference(call(), exact)
        bench.results[f"decode, {name}: difference"] = error
        assert error <= TOLERANCE[torch.bfloat16], f"{name} decodes to another video: {error}"


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure both, compare, print."""
    args = build_parser(__doc__).parse_args(argv)
    args.dtype = args.dtype or "float32"
    bench = Bench("vae", args)
    size = bench.size
    ours = random_module(WanVAE, size.vae, bench.device, bench.dtype)
    theirs = diffusers_vae(ours, bench.device, bench.dtype)
    latents, _, _ = random_inputs(size, bench.device)
    clip = torch.rand(1, 3, size.clip.frames, size.clip.height, size.clip.width).to(bench.device) * 2 - 1
    with exact_float32(bench.device):
        compare(bench, ours, theirs, clip, latents)
        time_decoding(bench, ours, latents)
    bench.finish()


if __name__ == "__main__":
    raise SystemExit(run(main))
