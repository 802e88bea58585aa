"""The diffusion transformer's forward, beside diffusers' WanTransformer3DModel with the same weights.

Nothing else of a run takes as long: a hundred forwards of 283 TFLOP at full size. Diffusers' is what most people run.
In bfloat16 both keep what they always keep in float32, which is not the same, so outputs agree to that rounding only.
"""

from copy import deepcopy
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Bench, difference, parser
from benchmarks.models import copy_weights, diffusers_class, random_dit, random_inputs
from wan_mini.device.flops import forward_flops
from wan_mini.device.select import compile_blocks
from wan_mini.dit import WanDiT, rope_table

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # norm of the difference over the norm


def diffusers_dit(ours: WanDiT, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    """None where there is no diffusers."""
    if (build := diffusers_class("WanTransformer3DModel")) is None:
        return None
    c = ours.config
    sizes = {"num_attention_heads": c.num_heads, "attention_head_dim": c.dim // c.num_heads, "ffn_dim": c.ffn_dim}
    sizes |= {"num_layers": c.num_layers, "text_dim": c.text_dim, "freq_dim": c.freq_dim}
    sizes |= {"in_channels": c.in_dim, "out_channels": c.out_dim, "patch_size": c.patch_size}
    with device:
        theirs = build(**sizes)
    return copy_weights(ours, theirs, dtype)


def text_keys_values(dit: WanDiT, text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What a forward makes of the text alone, the same at every step."""
    context = dit.embed_text(text)
    layers = [block.cross_attn for block in dit.blocks]
    return [(attn.norm_k(attn.k(context)), attn.v(context)) for attn in layers]


def time_less_work(bench: Bench, ours: WanDiT, x: Tensor, text: Tensor, operations: int) -> None:
    """Rows of what could be done at once, or once instead of at every step."""
    timestep, two = torch.tensor([500.0]), torch.tensor([500.0, 500.0])
    both = x.expand(2, -1, -1, -1, -1), two, text.expand(2, -1, -1)
    bench.row("guidance, two passes", lambda: [ours(x, timestep, text) for _ in range(2)], operations=2 * operations)
    bench.row("guidance, a batch of two", lambda: ours(*both), to="guidance, two passes", operations=2 * operations)
    layer, h = ours.blocks[0].self_attn, torch.randn(1, prod(ours.grid(x)), ours.config.dim).to(x.device, bench.dtype)
    parts = layer.q, layer.k, layer.v
    weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
    bench.row("q, k and v, three products", lambda: [part(h) for part in parts])
    bench.row("q, k and v, one product", lambda: F.linear(h, weight, bias), to="q, k and v, three products")
    width, kept = ours.config.dim // ours.config.num_heads, "could be kept for a run"
    bench.row("text's keys and values", lambda: text_keys_values(ours, text), to="ours", note=kept)
    bench.row("angles of RoPE", lambda: rope_table(ours.grid(x), width, x.device), to="ours", note=kept)


def time_kernels(bench: Bench, ours: WanDiT, x: Tensor, text: Tensor, operations: int) -> None:
    """Rows of the same work by other kernels: of attention, and compiled ones."""
    timestep = torch.tensor([500.0])
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        name = f"ours, {kernel.name.removesuffix('_ATTENTION').lower()} attention"

        def call(kernel=kernel):
            with sdpa_kernel(kernel):
                ours(x, timestep, text)

        try:
            bench.row(name, call, to="ours", operations=operations)
        except RuntimeError as problem:  # not on this device, or not in this dtype
            bench.skip(name, str(problem))
    compiled = deepcopy(ours)
    compile_blocks(compiled)
    try:
        bench.row("ours, compiled blocks", lambda: compiled(x, timestep, text), to="ours", operations=operations)
    except RuntimeError as problem:  # no compiler
        bench.skip("ours, compiled blocks", str(problem))


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure both, compare, print."""
    bench = Bench("dit", parser(__doc__).parse_args(argv))
    ours = random_dit(bench.size.dit, bench.device, bench.dtype)
    theirs = diffusers_dit(ours, bench.device, bench.dtype)
    x, _, text = random_inputs(bench.size, bench.device)
    timestep, operations = torch.tensor([500.0]), forward_flops(bench.size.dit, prod(bench.size.grid))
    inputs = x.to(bench.dtype), timestep.to(bench.device), text.to(bench.dtype)
    if theirs is None:
        bench.skip("diffusers", "not installed")
    else:
        bench.row("diffusers", lambda: theirs(*inputs), operations=operations)
    bench.row("ours", lambda: ours(x, timestep, text), to="diffusers", operations=operations)
    time_less_work(bench, ours, x, text, operations)
    time_kernels(bench, ours, x, text, operations)
    if theirs is not None:
        error = bench.facts["velocity, difference"] = difference(ours(x, timestep, text), theirs(*inputs).sample)
        assert error <= TOLERANCE[bench.dtype], f"the two compute different velocities: {error}"
    bench.finish()


if __name__ == "__main__":
    main()
