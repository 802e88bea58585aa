"""What every saving buys and costs: motion against operations and seconds, on held-out clips with true tracks.

    python -m benchmarks.frontier --clips 50          # all points; hours, and a stopped run goes on
    python -m benchmarks.frontier --clips 4 --points default fast
    python -m benchmarks.frontier --show              # the table and the figure of what has been run

Each point is the tiny model's own options but for what POINTS changes. The columns for 1.3B and 14B are arithmetic: the
operations of the same change to the defaults at 81 frames of 480x832, over a stated speed (--rate); where a saving
depends on the data (caches, early stops), it saves there the share that it saved on the tiny model. "release's
schedule" has the results of the published code's choices, at the operations of its way to compute them.
Differences are paired, clip by clip, from the point "default".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import fastvmt
from benchmarks.metrics.points import Point, add_flags, mean_text, run_points
from benchmarks.metrics.rows import Row, difference_text, paired, values_of
from benchmarks.metrics.scatter import Mark, scatter
from wan_mini.config import T2V_1_3B, T2V_14B, TINY, DiTConfig, token_grid
from wan_mini.device import flops
from wan_mini.runs.cli import Parser, run
from wan_mini.runs.request import load_preset
from wan_mini.savings import guidance_cost, sampling_passes

RESULTS = Path(__file__).parent / "results" / "frontier.csv"
BASE = "default"
PLAIN = "plain sampling"
RELEASE = "release's schedule"
MARKED = {BASE: "#d55e00", RELEASE: "#cc79a7", "dense": "#0072b2", PLAIN: "#009e73", "fast": "#e69f00"}
RELEASED = {"window_anchor": "self", "centroid": "soft", "reference": "noised"}
FOUR: dict[str, Any] = {"cfg_interval": (0.9, 1.0), "guide_every": 2, "frames_every": 2, "interval": 5}
# What each point changes in a checkpoint's options; blocks are of six, and scaled to a deeper model.
POINTS: dict[str, dict[str, Any]] = {
    PLAIN: {"amf": "none"},
    BASE: {},
    RELEASE: RELEASED,
    "dense": {"amf": "dense"},
    "a gradient an update": {"interval": 1},
    "cfg from 0.6": {"cfg_interval": (0.6, 1.0)},
    "cfg from 0.9": {"cfg_interval": (0.9, 1.0)},
    "cfg to 0.9": {"cfg_interval": (0.0, 0.9)},
    "cache 0.1": {"cache": 0.1},
    "cache 0.2": {"cache": 0.2},
    "guide every 2nd": {"guide_every": 2},
    "guide every 3rd": {"guide_every": 3},
    "half the share, as far": {"guidance_fraction": 0.5, "lr": 2.0},  # both are factors of the default's
    "twice the share": {"guidance_fraction": 2.0, "lr": 1.0},
    "gradient every 2nd": {"gradient_every": 2},
    "gradient every 3rd": {"gradient_every": 3},
    "interval 5": {"interval": 5},
    "interval 10": {"interval": 10},
    "block 1": {"block": 1},
    "block 2": {"block": 2},
    "anchors every 2nd": {"anchor_every": 2},
    "span 1": {"span": 1},
    "frames every 2nd": {"frames_every": 2},
    "tokens every 2nd": {"tokens_every": 2},
    "stop at 0.7": {"stop_loss": 0.7},
    "stop at 0.4": {"stop_loss": 0.4},
    "cfg from 0.6, cache 0.3": {"cfg_interval": (0.6, 1.0), "cache": 0.3},
    "cfg from 0.6, cache 0.3, interval 5": {"cfg_interval": (0.6, 1.0), "cache": 0.3, "interval": 5},
    "four at once": FOUR,
    "four at once, cache 0.1": {**FOUR, "cache": 0.1},
    "fast": dict(fastvmt.PRESETS["fast"]),
}
SIZES = {"1.3B": T2V_1_3B, "14B": T2V_14B}
GRID = token_grid(81, 480, 832)


def config_of(preset: fastvmt.MotionConfig, changes: Mapping[str, Any], layers: int) -> fastvmt.MotionConfig:
    """A preset with the changes of a point, for a model of so many blocks."""
    options = dict(changes)
    if "block" in options:
        options["block"] = options["block"] * layers // TINY.num_layers
    if "guidance_fraction" in options:
        factor = options["lr"]
        options["guidance_fraction"] *= preset.guidance_fraction
        options["lr"] = (factor * preset.lr[0], factor * preset.lr[1])
    return replace(preset, **options)


@dataclass(frozen=True)
class Operations:
    """What a run costs at most."""

    guidance: float
    denoising: float

    @property
    def total(self) -> float:
        """Both."""
        return self.guidance + self.denoising


def operations(
    config: fastvmt.MotionConfig, dit: DiTConfig, grid: tuple[int, int, int], *, released: bool = False
) -> Operations:
    """Operations of a run by the counts of savings.py; released: on the published code's schedule."""
    tokens = math.prod(grid)
    block = (dit.num_layers - 1) // 2 if config.block is None else config.block
    cost = guidance_cost(config, dit, block, grid)
    guidance = cost.flops + cost.flow
    if released:
        guidance = cost.gradients * released_gradient(dit, tokens, block)
        guidance += config.guided_steps * released_forward(dit, tokens)
    return Operations(guidance, sampling_passes(config) * flops.forward_flops(dit, tokens))


def released_forward(dit: DiTConfig, tokens: int) -> int:
    """The published code's reading of queries and keys: two thirds of the blocks, and the head."""
    linear, attention = flops.block_flops(dit, tokens)
    depth = 2 * dit.num_layers // 3
    return flops.edge_flops(dit, tokens) + depth * (linear + attention) + flops.head_flops(dit, tokens)


def released_gradient(dit: DiTConfig, tokens: int, block: int) -> int:
    """Its gradient: each block before the one read is recomputed, and its self-attention once more inside.

    Of the block that is read, self-attention is recomputed twice. The later blocks get no gradient.
    """
    linear, attention = flops.block_flops(dit, tokens)
    again = 4 * flops.linear_flops(tokens, dit.dim, dit.dim) + flops.attention_flops(dit, tokens, tokens)
    backward = flops.gradient_flops(dit, tokens, block) - flops.forward_flops(dit, tokens, block)
    recomputed = block * (linear + attention + again) + 2 * again
    return released_forward(dit, tokens) + recomputed + backward


def measured(rows: Sequence[Row], name: str) -> Operations | None:
    """Mean operations of a point's runs, on the tiny model; None where nothing was run."""
    guidance = list(values_of(rows, name, "guidance_gflop").values())
    denoising = list(values_of(rows, name, "denoising_gflop").values())
    if not guidance:
        return None
    return Operations(1e9 * float(np.mean(guidance)), 1e9 * float(np.mean(denoising)))


def share(part: float, whole: float) -> float:
    """part / whole; 1 of nothing."""
    return part / whole if whole else 1.0


def predicted(
    name: str, dit: DiTConfig, planned: Operations, spent: Operations | None, points: Mapping[str, Mapping[str, Any]]
) -> float:
    """Operations of a point's change at a large model; planned, spent: on the tiny model, by count and in its runs."""
    config = config_of(fastvmt.MotionConfig(), points[name], dit.num_layers)
    most = operations(config, dit, GRID, released=name == RELEASE)
    if spent is None or name == RELEASE:
        return most.total
    saved_guidance = share(spent.guidance, planned.guidance)
    return most.guidance * saved_guidance + most.denoising * share(spent.denoising, planned.denoising)


def tiny_operations(
    name: str, rows: Sequence[Row], preset: fastvmt.MotionConfig
) -> tuple[Operations, Operations | None]:
    """Operations of a point on the tiny model: by count, and in its runs."""
    config = config_of(preset, POINTS[name], TINY.num_layers)
    grid = token_grid(33, 128, 192)
    planned = operations(config, TINY, grid, released=name == RELEASE)
    spent = measured(rows, name)
    if spent is not None and name == RELEASE:
        spent = Operations(planned.guidance, spent.denoising)
    return planned, spent


def table(rows: Sequence[Row], preset: fastvmt.MotionConfig, rate: float) -> str:
    """All points in Markdown: quality, operations of the default's, and what they come to at 1.3B and 14B."""
    quality = ("correlation", "error_px", "subject", "shape_ok", "color_ok", "seconds")
    head = ["point", "clips", *quality, "correlation - default", "operations"]
    for size in SIZES:
        head += [f"{size}, PFLOP", f"s at {rate:g} TFLOP/s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    whole = tiny_operations(BASE, rows, preset)[0].total
    for name in POINTS:
        planned, spent = tiny_operations(name, rows, preset)
        cells = [name, str(len(values_of(rows, name, "seconds")))]
        for measure in quality:
            cells.append(mean_text(rows, name, measure))
        cells.append(difference_text(paired(rows, name, BASE, "correlation")))
        cells.append(f"{(spent or planned).total / whole:.2f}")
        for dit in SIZES.values():
            total = predicted(name, dit, planned, spent, POINTS)
            cells += [f"{total / 1e15:.1f}", f"{total / 1e12 / rate:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(rows: Sequence[Row], preset: fastvmt.MotionConfig) -> str:
    """The frontier as SVG: correlation against operations on the tiny model, in those of the default."""
    whole = tiny_operations(BASE, rows, preset)[0].total
    marks = []
    for name in POINTS:
        planned, spent = tiny_operations(name, rows, preset)
        values = list(values_of(rows, name, "correlation").values())
        if values:
            error = paired(rows, name, BASE, "correlation")
            half = (error[2] - error[1]) / 2 if error else 0.0
            color = MARKED.get(name, "#555555")
            marks.append(Mark(name, (spent or planned).total / whole, float(np.mean(values)), half, color))
    plain = tiny_operations(PLAIN, rows, preset)[0].total / whole
    return scatter(
        marks,
        title="The frontier: motion against operations",
        x_title="operations of a transfer, in those of FastVMT's default (tiny model)",
        y_title="correlation with the true motion",
        limit=(plain, "limit: guidance for nothing"),
        ceiling=(1.0, "limit: the true motion"),
    )


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m benchmarks.frontier", description="Motion against operations, for every saving.")
    add_flags(p, RESULTS, clips=50)
    p.add_argument("--figure", type=Path, help="SVG to write (beside the CSV)")
    p.add_argument("--rate", type=float, default=600.0, metavar="TFLOP/S", help="of the large models (%(default)g)")
    return p


def program(argv: list[str] | None = None) -> None:
    """Run what the CSV lacks, print the table, draw the figure."""
    args = parser().parse_args(argv)
    _, preset = load_preset(args.model, fastvmt.MotionConfig())
    points = {}
    for name, changes in POINTS.items():
        points[name] = Point(config_of(preset, changes, TINY.num_layers))
    rows = run_points(args, points)
    print(table(rows, preset, args.rate))
    if rows:
        path = args.figure or args.csv.with_suffix(".svg")
        path.write_text(figure(rows, preset), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(run(program))
