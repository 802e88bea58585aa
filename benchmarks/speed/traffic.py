"""What several processes send one another, counted, and the seconds that follow from a stated speed and bandwidth.

Nothing is timed and no process is started: a denoising step and a gradient of the guidance run on meta tensors, as the
first of so many processes, and every collective that they call is counted. A process's bytes are those that it sends
(it gets as many). Predicted seconds are arithmetic: this process's operations at --tflops, plus its bytes at
--bandwidth, one after the other. A step of classifier-free guidance has two passes; a gradient has one, so that "cfg"
alone does not make it faster. The flow and its loss are not counted: every process computes them whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # processes that nobody waits for
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.random_models import SIZE_NAMES, Size, named_size
from wan_mini.device.flops import forward_flops, gradient_flops
from wan_mini.device.memory import set_weight_dtypes
from wan_mini.device.parallel import Ranks
from wan_mini.dit import WanDiT
from wan_mini.pipeline import guided_velocity
from wan_mini.runs.cli import Parser

LAYOUTS = (("cfg", 2), ("sequence", 2), ("sequence", 4), ("cfg,sequence", 4), ("cfg,sequence", 8))
HEADINGS = ("mode", "processes", "collectives", "a block", "GB", "s to compute", "s to send", "of one process")


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives, and the bytes that this process sends in them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {"all_to_all": 0, "all_gather": 0}
        self.bytes = 0.0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.name()
        if name.startswith("_c10d_functional::all_to_all_single"):
            self.calls["all_to_all"] += 1
            n = args[0].shape[0]  # one part for each process
            self.bytes += args[0].nbytes * (n - 1) / n
        elif name.startswith("c10d::allgather_"):
            self.calls["all_gather"] += 1
            n = len(args[0][0])
            self.bytes += args[1][0].nbytes * (n - 1)
        return operation(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Traffic:
    """What one process does in a step or a gradient."""

    calls: dict[str, int]
    bytes: float
    blocks: int
    operations: float

    @property
    def per_block(self) -> float:
        """All-to-alls of a block."""
        return self.calls["all_to_all"] / self.blocks


def meta_model(size: Size) -> tuple[WanDiT, Tensor, Tensor]:
    """A transformer with bfloat16 weights, latents and a text, without contents."""
    with torch.device("meta"):
        dit = WanDiT(size.dit)
        latents = torch.zeros(size.latents)
        text = torch.zeros(1, size.dit.text_len, size.dit.text_dim)
    set_weight_dtypes({"dit": dit}, torch.bfloat16)
    return dit, latents, text


def count(call: Callable[[], object]) -> CollectiveCounter:
    """The collectives of a call."""
    with CollectiveCounter() as counter:
        call()
    return counter


def traffic_of(size: Size, mode: str, processes: int) -> dict[str, Traffic]:
    """Of a denoising step and of a gradient, in the first of so many processes."""
    tokens = prod(size.grid)
    timestep = torch.tensor(500.0)
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        dit, latents, text = meta_model(size)
        ranks = Ranks(mode)
        ranks.check(size.dit, tokens, "none")
        ranks.share(dit)

        def step() -> None:
            with torch.no_grad():
                guided_velocity(dit, latents, timestep, text, text, size.motion.cfg)

        def gradient() -> None:
            x = latents.clone().requires_grad_()
            q, k = dit(x, timestep.reshape(1), text, qk_block=size.block)
            torch.autograd.grad((q * k).sum(), x)

        stepped = count(step)
        guided = count(gradient)
        sharing = 1
        if ranks.whole is not None:
            sharing = ranks.whole.size()
    finally:
        dist.destroy_process_group()
    step_blocks = size.dit.num_layers * (2 if mode == "sequence" else 1)
    step_operations = 2 * forward_flops(size.dit, tokens) / processes
    gradient_operations = gradient_flops(size.dit, tokens, size.block) / sharing
    return {
        "denoising step": Traffic(stepped.calls, stepped.bytes, step_blocks, step_operations),
        "gradient": Traffic(guided.calls, guided.bytes, size.block, gradient_operations),
    }


def table(size: Size, what: str, tflops: float, bandwidth: float) -> list[list[str]]:
    """The rows of a step or of a gradient; bandwidth in GB/s."""
    tokens = prod(size.grid)
    whole = 2 * forward_flops(size.dit, tokens)
    if what == "gradient":
        whole = gradient_flops(size.dit, tokens, size.block)
    rows = [["one process", "1", "0", "0", "0", f"{whole / tflops / 1e12:.3f}", "0", "1"]]
    for mode, processes in LAYOUTS:
        traffic = traffic_of(size, mode, processes)[what]
        compute = traffic.operations / tflops / 1e12
        send = traffic.bytes / bandwidth / 1e9
        ratio = (compute + send) / (whole / tflops / 1e12)
        calls = sum(traffic.calls.values())
        cells = [
            f"{traffic.per_block:g}",
            f"{traffic.bytes / 1e9:.3f}",
            f"{compute:.3f}",
            f"{send:.3f}",
            f"{ratio:.3f}",
        ]
        rows.append([mode, str(processes), str(calls), *cells])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Count and print, in Markdown."""
    parser = Parser(prog="python -m benchmarks.speed.traffic", description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", choices=SIZE_NAMES, default="1.3B", help="of model and clip (%(default)s)")
    parser.add_argument("--tflops", type=float, default=458, help="of one device (%(default)s: 45.8 PFLOP in 100 s)")
    parser.add_argument("--bandwidth", type=float, default=300, help="GB/s that a process sends (%(default)s)")
    args = parser.parse_args(argv)
    for what in ("denoising step", "gradient"):
        print(f"\n{args.size}, one {what}, {args.tflops:g} TFLOP/s, {args.bandwidth:g} GB/s:\n")
        print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|")
        for row in table(named_size(args.size), what, args.tflops, args.bandwidth):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
