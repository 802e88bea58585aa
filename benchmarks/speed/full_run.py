"""A whole motion transfer by stages, and its guidance beside the released schedule of the same mathematics.

The run is `fastvmt.transfer` on random weights and a clip of noise: what it computes is no image, what it costs is
the same. It is warmed up by a run of one step. Of the released schedule one guided step is measured beside one of ours;
"with released guidance" is then our run with the guide stage exchanged for as many of those, composed of measured parts
and labeled so. --released measures that run instead (on an H100, some two minutes more).
The DiT passes are the guide and denoise stages, their operations those of wan_mini/device/flops.py.
"""

import time
from dataclasses import replace
from functools import partial
from math import ceil, prod
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import fastvmt
from benchmarks.speed.bench import Bench, build_parser
from benchmarks.speed.guided_step import GuidedStep
from benchmarks.speed.random_models import Size, random_wan
from benchmarks.speed.release_schedule import ReleaseGuidance, release_optimize
from fastvmt import Guide
from skip_optim import optimize
from wan_mini.device.flops import forward_flops, gradient_flops
from wan_mini.load import Wan
from wan_mini.runs.cli import run

Costs = dict[str, dict[str, Any]]  # stage -> seconds and perhaps peak_gb
PROMPT = "a fox runs over a frozen lake"


def guided_step_operations(size: Size) -> int:
    """One reference pass and the gradients of one guided step."""
    config = size.motion
    tokens = prod(size.grid)
    gradients = ceil(config.inner_steps / config.interval)
    reference = forward_flops(size.dit, tokens, size.block)
    return reference + gradients * gradient_flops(size.dit, tokens, size.block)


def denoise_operations(size: Size) -> int:
    """All passes of the denoise stage; classifier-free guidance takes two a step."""
    passes = 1 if size.motion.cfg == 1 else 2
    return size.motion.steps * passes * forward_flops(size.dit, prod(size.grid))


def time_transfer(wan: Wan, size: Size, device: torch.device) -> Costs:
    """A transfer's stages and, as "whole", all of it: seconds, and on a GPU the peak of all that is held meanwhile."""
    shape = (size.frames, size.height, size.width, 3)
    clip = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    start = time.perf_counter()
    result = fastvmt.transfer(wan, clip, PROMPT, size.motion, device=device)
    whole: dict[str, Any] = {"seconds": time.perf_counter() - start}
    stages = result.report["stages"]
    if device.type == "cpu":  # peaks are the process's so far, which says nothing of a stage
        seconds = {name: {"seconds": cost["seconds"]} for name, cost in stages.items()}
        return {"whole": whole, **seconds}
    whole["peak_gb"] = max(stage["peak_gb"] for stage in stages.values())
    return {"whole": whole, **stages}


def run_guided_step(step: GuidedStep, guidance: Guide, optimizer: Any) -> None:
    """The reference's pass, then the updates."""
    config = step.config
    with torch.no_grad():
        loss = guidance.loss_at(step.timestep, step.noised_reference)
        optimizer(step.latents, loss, steps=config.inner_steps, interval=config.interval, lr=config.lr)


def time_guided_steps(bench: Bench, wan: Wan) -> None:
    """A row for one guided step of each schedule."""
    step = GuidedStep(bench, wan.dit)
    schedules = {"released": (ReleaseGuidance, release_optimize), "ours": (Guide, optimize)}
    operations = guided_step_operations(bench.size)
    for name, (kind, optimizer) in schedules.items():
        call = partial(run_guided_step, step, step.guidance(kind), optimizer)
        bench.row(f"guided step, {name}", call, reference="guided step, released", operations=operations)


def record_released_run(bench: Bench, wan: Wan, ours: Costs) -> None:
    """The row of the run with the released schedule: measured, or composed of ours and one guided step of it."""
    name = "run, released guidance"
    if bench.args.released:
        with patch.multiple(fastvmt, Guide=ReleaseGuidance, optimize=release_optimize):
            released = time_transfer(wan, bench.size, bench.device)
        bench.record(name, **released["whole"], note="measured")
        return
    step = bench.rows["guided step, released"]["seconds"]
    if step is None:
        bench.skip(name, "its guided step could not be measured")
        return
    steps = bench.size.motion.guided_steps
    seconds = ours["whole"]["seconds"] - ours["guide"]["seconds"] + steps * step
    bench.record(name, seconds, note=f"composed: ours, its guide stage exchanged for {steps} guided steps, released")


def time_runs(bench: Bench, wan: Wan) -> None:
    """Rows for the run with each schedule, and for our stages."""
    size = bench.size
    warm_up = replace(size, motion=replace(size.motion, steps=1))
    time_transfer(wan, warm_up, bench.device)
    ours = time_transfer(wan, size, bench.device)
    record_released_run(bench, wan, ours)
    whole = ours.pop("whole")
    bench.record("run, ours", **whole, reference="run, released guidance", note="peak: all that is held")
    passes = {
        "guide": size.motion.guided_steps * guided_step_operations(size),
        "denoise": denoise_operations(size),
    }
    for name, cost in ours.items():
        bench.record(f"stage {name}", **cost, reference="run, ours", operations=passes.get(name, 0))
    seconds = ours["guide"]["seconds"] + ours["denoise"]["seconds"]
    operations = passes["guide"] + passes["denoise"]
    bench.record("stages guide and denoise", seconds, reference="run, ours", operations=operations)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = build_parser(__doc__, repeats=1)
    parser.add_argument("--released", action="store_true", help="run the released schedule as a whole too")
    bench = Bench("full_run", parser.parse_args(argv))
    wan = random_wan(bench.size, bench.args.size, bench.device, bench.dtype)
    time_guided_steps(bench, wan)
    time_runs(bench, wan)
    bench.finish()


if __name__ == "__main__":
    raise SystemExit(run(main))
