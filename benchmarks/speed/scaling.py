"""How guidance and a whole run scale with the clip's length and size, and with the span and the window of the flow.

Each sweep changes one number of the size's own transfer and leaves the others: latent frames, tokens a frame, span (in
latent frames; on a longer clip, as one shorter than the span has no such pairs), window (in tokens). "flow" is
windowed_amf forward and backward, "gradient" one gradient evaluation around it, "run" a transfer of two steps, one of
them guided, with its VAE. An exponent of 1 is growth in proportion, of 2 with the square.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.amf import forward_backward
from benchmarks.speed.bench import Bench, build_parser
from benchmarks.speed.full_run import time_transfer
from benchmarks.speed.guided_step import GuidedStep
from benchmarks.speed.measure import exponent
from benchmarks.speed.random_models import Size, random_wan
from fastvmt import FastVMT
from wan_mini.config import TOKEN_SIZE
from wan_mini.device.select import attention_backend
from wan_mini.load import Wan
from wan_mini.runs.cli import run
from window import windowed_amf

FRAMES = (9, 17, 33, 65, 161)
SCALES = (0.5, 1, 2)
SPANS = (1, 2, 4, 8)
WINDOWS = (3, 5, 7)
LONG = 65  # frames of the clip for the spans: 17 latent ones
Sweep = list[tuple[int, Size]]  # the number that changes, and the size with it


def sweeps(size: Size) -> dict[str, Sweep]:
    """What is changed, and how."""
    by_frames = []
    for frames in FRAMES:
        changed = replace(size, clip=replace(size.clip, frames=frames))
        by_frames.append((changed.grid[0], changed))
    by_tokens = []
    for scale in SCALES:
        height = round(size.clip.height * scale / TOKEN_SIZE) * TOKEN_SIZE
        width = round(size.clip.width * scale / TOKEN_SIZE) * TOKEN_SIZE
        changed = replace(size, clip=replace(size.clip, height=height, width=width))
        by_tokens.append((changed.grid[1] * changed.grid[2], changed))
    long = replace(size, clip=replace(size.clip, frames=LONG))
    by_span = [(span, replace(long, motion=replace(size.motion, span=span))) for span in SPANS]
    by_window = [(window, replace(size, motion=replace(size.motion, window=window))) for window in WINDOWS]
    return {"latent frames": by_frames, "tokens a frame": by_tokens, "span": by_span, "window": by_window}


def time_guidance(bench: Bench, wan: Wan, label: str) -> None:
    """Rows of a flow and of a gradient, for bench.size."""
    step = GuidedStep(bench, wan.dit)
    loss = step.loss(FastVMT, "none", norms={})
    guidance = step.guidance(FastVMT)
    config = step.config
    with torch.no_grad():
        q, k = guidance.queries_keys(step.latents, step.timestep, step.text)

    def flow(q: Tensor, k: Tensor) -> Tensor:
        displacement, _ = windowed_amf(
            q,
            k,
            guidance.grid,
            guidance.pairs,
            tau=config.tau,
            tile=config.tile,
            window=config.window,
            centers=step.target.centers,
        )
        return displacement

    bench.row(f"flow, {label}", partial(forward_backward, flow, q, k), note=f"{len(guidance.pairs)} pairs")
    x = step.latents.clone().requires_grad_()
    loss(x)  # the first gradient of a guided step does more
    bench.row(f"gradient, {label}", lambda: torch.autograd.grad(loss(x), x))


def time_short_run(bench: Bench, wan: Wan, label: str) -> None:
    """The row of a transfer of two steps, for bench.size."""
    motion = replace(bench.size.motion, steps=2, guidance_fraction=0.5)
    costs = time_transfer(wan, replace(bench.size, motion=motion), bench.device)
    bench.record(f"run, {label}", **costs["whole"])


def exponents(bench: Bench, name: str, sweep: Sweep) -> dict[str, float]:
    """Of time and memory against the number that changes, for every kind of row that has them."""
    values = {}
    for what in ("flow", "gradient", "run"):
        for key, label in (("seconds", "time"), ("peak_gb", "memory")):
            points = []
            for number, _ in sweep:
                row = bench.rows.get(f"{what}, {name} {number}", {})
                if row.get(key):
                    points.append((number, row[key]))
            if len(points) > 1:
                values[f"{what} with {name}, exponent of {label}"] = exponent(points)
    return values


def time_sweep(bench: Bench, wan: Wan, name: str, sweep: Sweep) -> None:
    """The rows of one sweep, and its exponents."""
    for number, changed in sweep:
        bench.size = changed
        label = f"{name} {number}"
        time_guidance(bench, wan, label)
        if name in ("latent frames", "tokens a frame"):
            time_short_run(bench, wan, label)
    bench.results |= exponents(bench, name, sweep)


def main(argv: list[str] | None = None) -> None:
    """Measure all sweeps, and print."""
    bench = Bench("scaling", build_parser(__doc__, repeats=3).parse_args(argv))
    size = bench.size
    wan = random_wan(size, bench.args.size, bench.device, bench.dtype)
    with attention_backend(bench.attention):
        warm_up = replace(size, motion=replace(size.motion, steps=1))
        time_transfer(wan, warm_up, bench.device)  # or the first of the runs below would be a cold one
        for name, sweep in sweeps(size).items():
            time_sweep(bench, wan, name, sweep)
    bench.finish()


if __name__ == "__main__":
    raise SystemExit(run(main))
