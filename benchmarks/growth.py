"""How guidance and a whole run grow with the clip's length and size, and with the span and the window of the flow.

Each sweep changes one number of the size's own transfer and leaves the others: latent frames, tokens a frame, span (in
latent frames; on a longer clip, as one shorter than the span has no such pairs), window (in tokens). "flow" is
windowed_amf forward and backward, "gradient" one gradient evaluation around it, "run" a transfer of two steps, one of
them guided, with its VAE. An exponent of 1 is growth in proportion, of 2 with the square.
"""

from dataclasses import replace

import torch

from benchmarks.amf import pull
from benchmarks.common import Bench, parser, slope
from benchmarks.gradient import Step
from benchmarks.whole import random_wan, run_once
from fastvmt import Guide, MotionConfig
from wan_mini.load import Wan
from window import windowed_amf

FRAMES, SCALES, SPANS, WINDOWS = (9, 17, 33, 65, 161), (0.5, 1, 2), (1, 2, 4, 8), (3, 5, 7)
LONG = 65  # frames of the clip for the spans: 17 latent ones
Sweep = list[tuple[int, MotionConfig]]  # the number that changes, and the transfer with it


def sweeps(c: MotionConfig) -> dict[str, Sweep]:
    """What is changed, and how."""
    sides = [(round(c.height * s / 16) * 16, round(c.width * s / 16) * 16) for s in SCALES]
    return {
        "latent frames": [((n - 1) // 4 + 1, replace(c, frames=n)) for n in FRAMES],
        "tokens a frame": [(h * w // 256, replace(c, height=h, width=w)) for h, w in sides],
        "span": [(n, replace(c, frames=LONG, span=n)) for n in SPANS],
        "window": [(n, replace(c, window=n)) for n in WINDOWS],
    }


def time_guidance(bench: Bench, wan: Wan, ending: str) -> None:
    """Rows of a flow and of a gradient, for bench.size."""
    step = Step(bench, wan.dit)
    loss, guide = step.loss(Guide, "none")
    c, x = step.config, step.x.clone().requires_grad_()
    with torch.no_grad():
        q, k = guide.qk(step.x, step.timestep, step.text)
    options = {"tau": c.tau, "tile": c.tile, "window": c.window, "centers": guide.centers}

    def flow(q, k):
        return windowed_amf(q, k, guide.grid, guide.pairs, **options)[0]

    bench.row(f"flow, {ending}", lambda: pull(flow, q, k), note=f"{len(guide.pairs)} pairs")
    loss(x)  # the first gradient of a guided step does more
    bench.row(f"gradient, {ending}", lambda: torch.autograd.grad(loss(x), x))


def exponents(bench: Bench, name: str, sweep: Sweep) -> dict[str, float]:
    """Of time and memory against the number that changes, for every kind of row that has them."""
    found = {}
    for what in ("flow", "gradient", "run"):
        rows = [(n, bench.rows.get(f"{what}, {name} {n}", {})) for n, _ in sweep]
        for key, label in (("seconds", "time"), ("peak_gb", "memory")):
            points = [(n, row[key]) for n, row in rows if row.get(key)]
            if len(points) > 1:
                found[f"{what} with {name}, exponent of {label}"] = slope(points)
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure all sweeps, and print."""
    bench = Bench("growth", parser(__doc__, repeats=3).parse_args(argv))
    wan, size = random_wan(bench), bench.size
    run_once(wan, replace(size.motion, steps=1), bench.device)  # or the first of the runs below would be a cold one
    for name, sweep in sweeps(size.motion).items():
        for n, config in sweep:
            bench.size = replace(size, motion=config)
            time_guidance(bench, wan, f"{name} {n}")
            if name in ("latent frames", "tokens a frame"):
                short = replace(config, steps=2, guided=0.5)
                bench.record(f"run, {name} {n}", **run_once(wan, short, bench.device)["whole"])
        bench.facts |= exponents(bench, name, sweep)
    bench.finish()


if __name__ == "__main__":
    main()
