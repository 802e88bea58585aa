"""Peak memory of a transfer: everything on the device, and within each budget that --memory takes, beside the dry run.

A transfer of two steps, one of them guided with one gradient, has every stage's peak; its seconds say little. Within a
budget it does what `fastvmt.py --memory GB` chooses. On a CPU there are no peaks, only the choice and the seconds.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.speed.bench import Bench, build_parser
from benchmarks.speed.full_run import PROMPT, random_clip
from benchmarks.speed.random_models import Size, random_wan
from fastvmt import gradient_of, transfer
from wan_mini.device.memory import MemoryPlan, choose_plan, estimate
from wan_mini.device.select import attention_backend
from wan_mini.device.timing import StageTimer
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.load import Wan
from wan_mini.runs.cli import run
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

BUDGETS = (24.0, 8.0)  # GB


def plans_of(size: Size, dtype: torch.dtype) -> list[MemoryPlan]:
    """What --dry-run prints for a transfer of this size."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "dit": WanDiT(size.dit),
            "vae": WanVAE(size.vae),
            "text_encoder": UMT5Encoder(size.text_encoder),
        }
    video = (1, 3, size.clip.frames, size.clip.height, size.clip.width)
    gradient = gradient_of(size.motion)
    return estimate(parts, dtype=dtype, video_shape=video, latent_shape=size.latents, gradient=gradient)


def time_plan(bench: Bench, wan: Wan, name: str, plan: MemoryPlan) -> None:
    """The row of one way to run."""
    size = bench.size
    config = replace(size.motion, steps=2, guidance_fraction=0.5, optim_steps=1)
    timer = StageTimer(bench.device)
    options: dict[str, Any] = {"offload_blocks": plan.offload == "blocks", "recompute": plan.recompute}
    transfer(wan, random_clip(size), PROMPT, config, device=bench.device, timer=timer, **options)
    peaks = {}
    for stage, cost in timer.table.items():
        peaks[stage] = cost["peak_gb"] or 0.0
    peak = None if bench.device.type == "cpu" else max(peaks.values())
    note = f"dry run {plan.peak:.2f} GB to {plan.largest_stage}; --offload {plan.offload}, recompute {plan.recompute}"
    bench.record(name, timer.elapsed(), peak_gb=peak, note=note)
    if peak is not None:
        bench.results[f"{name}, peak / dry run"] = peak / plan.peak


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    bench = Bench("limits", build_parser(__doc__, repeats=1).parse_args(argv))
    plans = plans_of(bench.size, bench.dtype)
    chosen = {"all on the device": plans[0]}
    for budget in BUDGETS:
        name = f"--memory {budget:g}"
        try:
            chosen[name] = choose_plan(plans, budget)
        except UserError as error:
            bench.skip(name, str(error))
    make = partial(random_wan, bench.size, bench.args.size, bench.device, bench.dtype)
    with attention_backend(bench.attention):
        for name, plan in chosen.items():
            wan = make()
            if plan.offload != "none":
                for part in (wan.dit, wan.vae, wan.text_encoder):
                    part.to("cpu")
            bench.release_memory()
            time_plan(bench, wan, name, plan)
            del wan
            bench.release_memory()
    bench.finish()


if __name__ == "__main__":
    raise SystemExit(run(main))
