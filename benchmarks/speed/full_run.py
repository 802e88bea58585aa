"""A whole motion transfer by stages, and its guidance beside the released schedule of the same mathematics.

The run is `fastvmt.transfer` on random weights and a clip of noise: what it computes is no image, what it costs is
the same. It is warmed up by a run of one step. Of the released schedule one guided step is measured beside one of ours;
"with released guidance" is then our run with the guide stage exchanged for as many of those, composed of measured parts
and labeled so. --released measures that run instead (on an H100, some two minutes more).
The DiT passes are the guide and denoise stages, their operations those of wan_mini/device/flops.py.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import ceil, prod
from typing import Any

import numpy as np
import torch

from benchmarks.speed.bench import Bench, build_parser
from benchmarks.speed.guided_step import GuidedStep
from benchmarks.speed.random_models import REHEARSAL, Size, random_wan
from benchmarks.speed.release_schedule import ReleaseGuidance
from fastvmt import FastVMT, transfer
from wan_mini.device.flops import forward_flops, gradient_flops
from wan_mini.device.select import (
    attention_backend,
    compile_blocks,
    compile_regions,
    exact_float32,
    float32_products,
)
from wan_mini.device.timing import StageTimer
from wan_mini.load import Wan
from wan_mini.pipeline import decode, denoise
from wan_mini.prompts import encode_prompts
from wan_mini.runs.cli import run
from wan_mini.scheduler import FlowEuler
from wan_mini.video import to_tensor

Costs = dict[str, dict[str, Any]]  # stage -> seconds and perhaps peak_gb
PROMPT = "a fox runs over a frozen lake"


def guided_step_operations(size: Size) -> int:
    """One reference pass and the gradients of one guided step."""
    config = size.motion
    tokens = prod(size.grid)
    gradients = ceil(config.optim_steps / config.interval)
    reference = forward_flops(size.dit, tokens, size.block)
    return reference + gradients * gradient_flops(size.dit, tokens, size.block)


def denoise_operations(size: Size) -> int:
    """All passes of the denoise stage; classifier-free guidance takes two a step."""
    passes = 1 if size.motion.cfg == 1 else 2
    return size.motion.steps * passes * forward_flops(size.dit, prod(size.grid))


def random_clip(size: Size) -> np.ndarray:
    """A clip of noise, (T,H,W,3) uint8."""
    shape = (size.clip.frames, size.clip.height, size.clip.width, 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def time_transfer(wan: Wan, size: Size, device: torch.device) -> Costs:
    """A transfer's stages and, as "whole", all of it: seconds, and on a GPU the peak of all that is held meanwhile."""
    clip = random_clip(size)
    timer = StageTimer(device)
    transfer(wan, clip, PROMPT, size.motion, device=device, timer=timer)
    whole: dict[str, Any] = {"seconds": timer.elapsed()}
    if device.type == "cpu":  # peaks are the process's so far, which says nothing of a stage
        seconds = {name: {"seconds": cost["seconds"]} for name, cost in timer.table.items()}
        return {"whole": whole, **seconds}
    whole["peak_gb"] = max(cost["peak_gb"] or 0.0 for cost in timer.table.values())
    return {"whole": whole, **timer.table}


@torch.no_grad()
def time_released_transfer(wan: Wan, size: Size, device: torch.device) -> float:
    """Seconds of fastvmt.transfer with the released schedule instead of ours; all of wan is on the device."""
    config = size.motion
    clip = random_clip(size)
    timer = StageTimer(device)
    text, negative_text, empty_text = encode_prompts(wan, [PROMPT, config.negative, ""], device)
    with exact_float32(device):
        reference = wan.vae.encode(to_tensor(clip).to(device), tile=config.vae_tile)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0)).to(device)
    guidance = ReleaseGuidance(wan.dit, reference, noise, text, empty_text, config)
    scheduler = FlowEuler(config.steps, config.shift)
    latents = denoise(wan.dit, noise, scheduler, text, negative_text, config.cfg, guidance=guidance, timer=timer)
    guidance.clean_flow(reference)
    guidance.clean_flow(latents)
    decode(wan.vae, latents, tile=config.vae_tile, dtype=wan.dtype)
    return timer.elapsed()


@torch.no_grad()
def run_guided_step(guidance: FastVMT, step: GuidedStep) -> None:
    """One step of guidance, without the denoising step after it."""
    guidance.before_step(0, step.latents, step.sigma, step.timestep)


def time_guided_steps(bench: Bench, wan: Wan) -> None:
    """A row for one guided step of each schedule: the reference's pass, then the updates."""
    step = GuidedStep(bench, wan.dit)
    operations = guided_step_operations(bench.size)
    for name, kind in (("released", ReleaseGuidance), ("ours", FastVMT)):
        guidance = step.guidance(kind)
        call = partial(run_guided_step, guidance, step)
        bench.row(f"guided step, {name}", call, reference="guided step, released", operations=operations)


def record_released_run(bench: Bench, wan: Wan, ours: Costs) -> None:
    """The row of the run with the released schedule: measured, or composed of ours and one guided step of it."""
    name = "run, released guidance"
    if bench.args.released:
        bench.record(name, time_released_transfer(wan, bench.size, bench.device), note="measured")
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
    text = "compile the transformer's blocks, or all regions; they are warm then (without a value: blocks)"
    parser.add_argument("--compile", nargs="?", const="blocks", choices=("blocks", "regions"), help=text)
    parser.add_argument("--tf32", action="store_true", help="products of what stays float32 in TF32, but for the VAE's")
    bench = Bench("full_run", parser.parse_args(argv))
    wan = random_wan(bench.size, bench.args.size, bench.device, bench.dtype)
    options = {"backend": "aot_eager"} if bench.args.size == REHEARSAL else {}  # inductor takes a minute
    if bench.args.compile == "blocks":
        compile_blocks(wan.dit, **options)
    elif bench.args.compile == "regions":
        compile_regions(wan.dit, wan.text_encoder, **options)
    precision = float32_products(bench.device, "tf32") if bench.args.tf32 else nullcontext()
    with attention_backend(bench.attention), precision:
        time_guided_steps(bench, wan)
        time_runs(bench, wan)
    bench.finish()


if __name__ == "__main__":
    raise SystemExit(run(main))
