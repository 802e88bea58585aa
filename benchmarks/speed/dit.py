"""The diffusion transformer's forward, beside diffusers' WanTransformer3DModel with the same weights.

Nothing else of a run takes as long: a hundred forwards of 283 TFLOP at full size. Diffusers' is what most people run.
In bfloat16 both keep what they always keep in float32, which is not the same, so outputs agree to that rounding only.
"""

from copy import deepcopy
from functools import partial
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.speed.bench import Bench, build_parser
from benchmarks.speed.diffusers_models import TOLERANCE, diffusers_dit
from benchmarks.speed.measure import difference
from benchmarks.speed.random_models import REHEARSAL, random_dit, random_inputs
from wan_mini.attention import rope_table
from wan_mini.device.flops import forward_flops
from wan_mini.device.select import attention_backend, compile_blocks
from wan_mini.dit import Block, WanDiT
from wan_mini.runs.cli import run

ATTENTION_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def text_keys_values(dit: WanDiT, text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What a forward computes of the text alone, the same at every step: keys and values of each cross-attention."""
    context = dit.embed_text(text)
    pairs = []
    for block in dit.blocks:
        attention = cast(Block, block).cross_attn
        pairs.append((attention.norm_k(attention.k(context)), attention.v(context)))
    return pairs


def forward(bench: Bench, dit: WanDiT, *inputs: Tensor) -> Tensor:
    """A forward by the kernels of attention that a run takes, which diffusers does not."""
    with attention_backend(bench.attention):
        return dit(*inputs)


def time_classifier_free_guidance(bench: Bench, ours: WanDiT, x: Tensor, text: Tensor, operations: int) -> None:
    """Rows of both passes of classifier-free guidance, one after the other and as a batch."""
    one = torch.tensor([500.0])
    two = torch.tensor([500.0, 500.0])
    latents = x.expand(2, -1, -1, -1, -1)  # (1,16,F,h,w) -> (2,16,F,h,w)
    texts = text.expand(2, -1, -1)  # (1,L,text_dim) -> (2,L,text_dim)
    reference = "guidance, two passes"

    def two_passes() -> None:
        forward(bench, ours, x, one, text)
        forward(bench, ours, x, one, text)

    bench.row(reference, two_passes, operations=2 * operations)
    batch = partial(forward, bench, ours, latents, two, texts)
    bench.row("guidance, a batch of two", batch, reference=reference, operations=2 * operations)


def time_savings(bench: Bench, ours: WanDiT, x: Tensor, text: Tensor) -> None:
    """Rows of what could be done in one product, or once instead of at every step."""
    grid = ours.grid(x)
    attention = cast(Block, ours.blocks[0]).self_attn
    layers = (attention.q, attention.k, attention.v)
    hidden = torch.randn(1, prod(grid), ours.config.dim).to(x.device, bench.dtype)  # (1,N,C)
    weight = torch.cat([layer.weight for layer in layers])  # 3 x (C,C) -> (3C,C)
    bias = torch.cat([layer.bias for layer in layers])  # 3 x (C,) -> (3C,)
    reference = "q, k and v, three products"
    bench.row(reference, lambda: [layer(hidden) for layer in layers])
    bench.row("q, k and v, one product", partial(F.linear, hidden, weight, bias), reference=reference)
    note = "could be kept for a run"
    width = ours.config.dim // ours.config.num_heads
    bench.row("text's keys and values", partial(text_keys_values, ours, text), reference="ours", note=note)
    bench.row("angles of RoPE", partial(rope_table, grid, width, x.device), reference="ours", note=note)


def forward_with_kernel(kernel: SDPBackend, dit: WanDiT, *inputs: Tensor) -> Tensor:
    """A forward by one kernel of attention. Raises RuntimeError where that does not run."""
    with sdpa_kernel(kernel):
        return dit(*inputs)


def time_kernels(bench: Bench, ours: WanDiT, x: Tensor, text: Tensor, operations: int) -> None:
    """Rows of the same work by other kernels: of attention, and compiled ones."""
    inputs = (x, torch.tensor([500.0]), text)
    calls = {}
    for name, kernel in ATTENTION_KERNELS.items():
        calls[f"ours, {name} attention"] = partial(forward_with_kernel, kernel, ours, *inputs)
    compiled = deepcopy(ours)
    if bench.args.size == REHEARSAL:
        compile_blocks(compiled, backend="aot_eager")  # inductor takes a minute
    else:
        compile_blocks(compiled)
    calls["ours, compiled blocks"] = partial(forward, bench, compiled, *inputs)
    for name, call in calls.items():
        try:
            bench.row(name, call, reference="ours", operations=operations)
        except RuntimeError as error:  # no such kernel on this device or in this dtype, or no compiler
            bench.skip(name, str(error))
    bench.results["attention kernels, the fastest first"] = ", ".join(fastest_kernels(bench))


def fastest_kernels(bench: Bench) -> list[str]:
    """The kernels that ran, for select.MEASURED_ATTENTION, behind the compute capability of a GPU."""
    seconds = {}
    for kernel in ATTENTION_KERNELS:
        row = bench.rows[f"ours, {kernel} attention"]
        if row["seconds"] is not None:
            seconds[kernel] = row["seconds"]
    kernels = sorted(seconds, key=seconds.__getitem__)
    backend = torch.get_device_module(bench.device)
    if hasattr(backend, "get_device_capability"):
        kernels.insert(0, str(backend.get_device_capability(bench.device)))
    return kernels


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure both, compare, print."""
    bench = Bench("dit", build_parser(__doc__).parse_args(argv))
    ours = random_dit(bench.size.dit, bench.device, bench.dtype)
    theirs = diffusers_dit(ours, bench.device, bench.dtype)
    x, _, text = random_inputs(bench.size, bench.device)
    timestep = torch.tensor([500.0])
    operations = forward_flops(bench.size.dit, prod(bench.size.grid))
    their_inputs = (x.to(bench.dtype), timestep.to(bench.device), text.to(bench.dtype))
    if theirs is None:
        bench.skip("diffusers", "not installed")
    else:
        bench.row("diffusers", lambda: theirs(*their_inputs), operations=operations)
    our_forward = partial(forward, bench, ours, x, timestep, text)
    bench.row("ours", our_forward, reference="diffusers", operations=operations)
    time_classifier_free_guidance(bench, ours, x, text, operations)
    time_savings(bench, ours, x, text)
    time_kernels(bench, ours, x, text, operations)
    if theirs is not None:
        error = difference(our_forward(), theirs(*their_inputs).sample)
        bench.results["velocity, difference"] = error
        assert error <= TOLERANCE[bench.dtype], f"the two compute different velocities: {error}"
    bench.finish()


if __name__ == "__main__":
    raise SystemExit(run(main))
