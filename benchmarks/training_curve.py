"""The learning curve of the tiny model: what its samples show, and where its attention matches, along the training.

    python -m benchmarks.training_curve WORK/dit-curve.jsonl

keeps the curve that a run of `python -m wan_mini.tiny.training dit` wrote into its --work folder as
benchmarks/results/training_curve.jsonl and draws training_curve.svg beside it; without a file it draws the stored one.
Needs matplotlib, of the notebooks extra.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes

from wan_mini.runs.cli import Parser, run
from wan_mini.tiny.training.recipe import BLOCK, DIT, Recipe

CURVE = Path(__file__).parent / "results" / "training_curve.jsonl"
LEVEL = "0.5"  # noise level of the matching that is drawn
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")  # Okabe and Ito: safe for color blindness
MARKERS = "osD^vX"
DRAWN = {
    "single": "one object",
    "several": "several objects",
    "articulated": "an object with a limb",
    "held-out pairs": "one object, unseen pair",
}

Entry = dict[str, Any]  # one line of the curve, as probe.py writes it


def draw_curve(entries: list[Entry], recipe: Recipe, file: Path) -> None:
    """Draw what samples show (above) and each block's matching (below) against the step, as an SVG."""
    steps = [entry["step"] for entry in entries]
    pyplot.switch_backend("svg")  # needs no screen
    pyplot.rcParams.update({"svg.hashsalt": "training curve", "font.size": 12})  # the same file every time
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(11, 8), sharex=True)
    for number, (name, label) in enumerate(DRAWN.items()):
        share = [100 * entry[name]["shape_ok"] for entry in entries]
        above.plot(steps, share, color=COLORS[number], marker=MARKERS[number], markersize=4, label=label)
    above.set_ylabel("generated pictures with\nthe right shapes, %")
    blocks = len(entries[0]["matching"][LEVEL])
    for block in range(blocks):
        share = [100 * entry["matching"][LEVEL][block] for entry in entries]
        label = f"block {block}, supervised" if block == BLOCK else f"block {block}"
        below.plot(steps, share, color=COLORS[block], marker=MARKERS[block], markersize=4, label=label)
    below.set_ylabel(f"moving tokens matched within\none token at noise level {LEVEL}, %")
    below.set_xlabel("training step")
    for axes in (above, below):
        mark_phases(axes, recipe)
        axes.set_ylim(-3, 103)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def mark_phases(axes: Axes, recipe: Recipe) -> None:
    """A vertical line where a phase of the recipe begins."""
    begin = 0
    for phase in recipe.phases[:-1]:
        begin += phase.steps
        axes.axvline(begin, color="#888888", linewidth=1, linestyle=":")


def main(argv: list[str] | None = None) -> None:
    """Keep a curve if one is named; draw the stored one."""
    parser = Parser(prog="python -m benchmarks.training_curve", description=__doc__.splitlines()[0])
    parser.add_argument("curve", type=Path, nargs="?", help="dit-curve.jsonl of a training's --work folder")
    args = parser.parse_args(argv)
    if args.curve is not None:
        shutil.copyfile(args.curve, CURVE)
    entries = [json.loads(line) for line in CURVE.read_text(encoding="utf-8").splitlines()]
    draw_curve(entries, DIT, CURVE.with_suffix(".svg"))
    print(f"{len(entries)} entries: {CURVE}, {CURVE.with_suffix('.svg')}")


if __name__ == "__main__":
    raise SystemExit(run(main))
