"""A whole motion transfer by stages, and its guidance beside the released schedule of the same mathematics.

The run is `fastvmt.transfer` on random weights and a clip of noise: what it computes is no picture, what it costs is
the same. It is warmed up by a run of one step. Of the released schedule one guided step is measured beside one of ours;
"with released guidance" is then our run with the guide stage exchanged for as many of those, composed of measured parts
and said to be so. --released measures that run instead (on an H100, some two minutes more).
The DiT passes are the guide and denoise stages, their operations those of wan_mini/flops.py.
"""

import time
from dataclasses import replace
from math import ceil, prod
from unittest.mock import patch

import numpy as np
import torch

import fastvmt
from benchmarks.common import Bench, parser
from benchmarks.gradient import Step
from benchmarks.models import Size, random_dit, random_module
from benchmarks.released import ReleasedGuide, released_optimize
from fastvmt import Guide, MotionConfig
from skip_optim import optimize
from wan_mini.device.flops import forward_flops, gradient_flops
from wan_mini.load import Wan
from wan_mini.tiny.grammar import CHARACTERS, tokenizer_json
from wan_mini.tokenizer import Tokenizer
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE


def random_wan(bench: Bench) -> Wan:
    """A whole model as load_wan makes it, with a tokenizer of single characters."""
    size, where = bench.size, (bench.device, bench.dtype)
    return Wan(
        dit=random_dit(size.dit, *where),
        vae=random_module(WanVAE, size.vae, bench.device, torch.float32),
        text_encoder=random_module(UMT5Encoder, size.text_encoder, *where),
        tokenizer=Tokenizer(tokenizer_json(dict.fromkeys(CHARACTERS, -1.0))),
        name=f"random {bench.args.size}",
    )


def guided_step_operations(size: Size) -> int:
    """One reference pass and the gradients of one guided step."""
    c, tokens = size.motion, prod(size.grid)
    block = (size.dit.num_layers - 1) // 2 if c.block is None else c.block
    gradients = ceil(c.inner_steps / c.interval)
    return forward_flops(size.dit, tokens, block) + gradients * gradient_flops(size.dit, tokens, block)


def run_once(wan: Wan, config: MotionConfig, device: torch.device) -> dict[str, dict]:
    """A transfer's stages and, as "whole", all of it: seconds, and on a GPU the peak of all that is held meanwhile."""
    clip = np.random.default_rng(0).integers(256, size=(config.frames, config.height, config.width, 3), dtype=np.uint8)
    start = time.perf_counter()
    result = fastvmt.transfer(wan, clip, "a fox runs over a frozen lake", config, device=device)
    seconds, stages = time.perf_counter() - start, result.report["stages"]
    if device.type == "cpu":  # the process's most so far, which says nothing of a stage
        stages = {name: {"seconds": cost["seconds"]} for name, cost in stages.items()}
        return {"whole": {"seconds": seconds}} | stages
    return {"whole": {"seconds": seconds, "peak_gb": max(stage["peak_gb"] for stage in stages.values())}} | stages


def time_guided_steps(bench: Bench, wan: Wan) -> None:
    """A row for one guided step of each schedule: the reference's pass, then the updates."""
    step, c = Step(bench, wan.dit), bench.size.motion
    ways = {"released": (ReleasedGuide, released_optimize), "ours": (Guide, optimize)}
    for name, (kind, function) in ways.items():
        guide = step.guide(kind)

        @torch.no_grad()
        def call(guide=guide, function=function):
            loss = guide.loss_at(step.timestep, step.noised)
            function(step.x, loss, steps=c.inner_steps, interval=c.interval, lr=c.lr)

        operations = guided_step_operations(bench.size)
        bench.row(f"guided step, {name}", call, to="guided step, released", operations=operations)


def time_runs(bench: Bench, wan: Wan) -> None:
    """Rows for the run with each schedule, and for our stages."""
    c = bench.size.motion
    run_once(wan, replace(c, steps=1), bench.device)
    ours, note = run_once(wan, c, bench.device), "measured"
    if bench.args.released:
        with patch.multiple(fastvmt, Guide=ReleasedGuide, optimize=released_optimize):
            released = run_once(wan, c, bench.device)["whole"]
        bench.record("run, released guidance", **released, note=note)
    elif step := bench.rows["guided step, released"]["seconds"]:
        seconds = ours["whole"]["seconds"] - ours["guide"]["seconds"] + c.guided_steps * step
        note = f"composed: ours, its guide stage exchanged for {c.guided_steps} guided steps, released"
        bench.record("run, released guidance", seconds=seconds, note=note)
    else:
        bench.skip("run, released guidance", "its guided step could not be measured")
    bench.record("run, ours", **ours.pop("whole"), to="run, released guidance", note="peak: all that is held")
    passes = {"guide": c.guided_steps * guided_step_operations(bench.size)}
    passes["denoise"] = c.steps * (1 if c.cfg == 1 else 2) * forward_flops(bench.size.dit, prod(bench.size.grid))
    for name, cost in ours.items():
        bench.record(f"stage {name}", **cost, to="run, ours", operations=passes.get(name, 0))
    seconds = sum(ours[name]["seconds"] for name in passes)
    bench.record("stages guide and denoise", seconds=seconds, to="run, ours", operations=sum(passes.values()))


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    p = parser(__doc__, repeats=1)
    p.add_argument("--released", action="store_true", help="run the released schedule as a whole too")
    bench = Bench("whole", p.parse_args(argv))
    wan = random_wan(bench)
    time_guided_steps(bench, wan)
    time_runs(bench, wan)
    bench.finish()


if __name__ == "__main__":
    main()
