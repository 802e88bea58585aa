"""The learning curve of the tiny model: what its samples show, and where its attention matches, along the training.

    python -m benchmarks.training_curve WORK/dit-curve.jsonl
    python -m benchmarks.training_curve --without-matching WORK/dit-without-matching-curve.jsonl

keeps the curve that a run of `python -m wan_mini.tiny.training` wrote into its --work folder, with the matching loss or
without it, and draws benchmarks/results/training_curve.svg of both; without a file it draws the stored ones. Needs
matplotlib, of the notebooks extra.
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
UNMATCHED = "training_curve_without_matching.jsonl"  # beside it
LEVEL = "0.5"  # noise level of the matching that is drawn
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")  # Okabe and Ito: safe for color blindness
MARKERS = "osD^vX"
DRAWN = {
    "single": "one object",
    "several": "several objects",
    "articulated": "an object with a limb",
    "held-out pairs": "one object, unseen pair",
}

Entry = dict[str, Any]  # one line of a curve, as probe.py writes it


def read_curve(file: Path) -> list[Entry]:
    """The lines of a curve."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def draw_curves(matched: list[Entry], unmatched: list[Entry], recipe: Recipe, file: Path) -> None:
    """Draw both trainings side by side, with the matching loss on the left, as an SVG.

    Above is what samples show, below how well each block matches, both against the step.
    """
    pyplot.switch_backend("svg")  # needs no screen
    pyplot.rcParams.update({"svg.hashsalt": "training curve", "font.size": 12})  # the same file every time
    figure, table = pyplot.subplots(2, 2, figsize=(14, 8), sharex=True, sharey=True)
    sides = ((f"with a matching loss on block {BLOCK}", matched), ("without it", unmatched))
    for column, (title, entries) in enumerate(sides):
        table[0, column].set_title(title)
        draw_shapes(table[0, column], entries)
        draw_matching(table[1, column], entries)
    table[0, 0].set_ylabel("generated pictures with\nthe right shapes, %")
    table[1, 0].set_ylabel(f"moving tokens matched within\none token at noise level {LEVEL}, %")
    table[0, 0].set_ylim(-3, 103)
    for axes in table.flat:
        mark_phases(axes, recipe)
    for row in table:
        row[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    for axes in table[1]:
        axes.set_xlabel("training step")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def draw_shapes(axes: Axes, entries: list[Entry]) -> None:
    """The share of samples with the right shapes, a line for each kind."""
    steps = [entry["step"] for entry in entries]
    for number, (name, label) in enumerate(DRAWN.items()):
        share = [100 * entry[name]["shape_ok"] for entry in entries]
        axes.plot(steps, share, color=COLORS[number], marker=MARKERS[number], markersize=4, label=label)


def draw_matching(axes: Axes, entries: list[Entry]) -> None:
    """The share of moving tokens that are matched, a line for each block."""
    steps = [entry["step"] for entry in entries]
    for block in range(len(entries[0]["matching"][LEVEL])):
        share = [100 * entry["matching"][LEVEL][block] for entry in entries]
        axes.plot(steps, share, color=COLORS[block], marker=MARKERS[block], markersize=4, label=f"block {block}")


def mark_phases(axes: Axes, recipe: Recipe) -> None:
    """A vertical line where a phase of the recipe begins."""
    begin = 0
    for phase in recipe.phases[:-1]:
        begin += phase.steps
        axes.axvline(begin, color="#888888", linewidth=1, linestyle=":")


def main(argv: list[str] | None = None) -> None:
    """Keep the curves that are named; draw the stored ones."""
    parser = Parser(prog="python -m benchmarks.training_curve", description=__doc__.splitlines()[0])
    parser.add_argument("curve", type=Path, nargs="?", help="dit-curve.jsonl of a training's --work folder")
    parser.add_argument("--without-matching", type=Path, help="dit-without-matching-curve.jsonl of one")
    args = parser.parse_args(argv)
    unmatched = CURVE.with_name(UNMATCHED)
    for given, kept in ((args.curve, CURVE), (args.without_matching, unmatched)):
        if given is not None:
            shutil.copyfile(given, kept)
    picture = CURVE.with_suffix(".svg")
    draw_curves(read_curve(CURVE), read_curve(unmatched), DIT, picture)
    print(f"{CURVE}, {unmatched}: {picture}")


if __name__ == "__main__":
    raise SystemExit(run(main))
