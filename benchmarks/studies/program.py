"""What all studies share: their points are run, compared with a base, and shown as a table and a forest plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.metrics.forest import Effect, forest
from benchmarks.metrics.points import Point, add_flags, mean_text, run_points
from benchmarks.metrics.rows import Row, difference_text, paired, values_of
from wan_mini.runs.cli import Parser

RESULTS = Path(__file__).parent.parent / "results" / "studies"


def run_study(name: str, docstring: str | None, points: Mapping[str, Point], base: str, argv: list[str] | None) -> None:
    """The whole program of a study: run what its CSV lacks, print its hypothesis and its table, draw its figure.

    base: the point with which those are compared that name none.
    """
    headline = (docstring or "").partition("\n")[0]
    p = Parser(prog=f"python -m benchmarks.studies.{name}", description=headline)
    add_flags(p, RESULTS / f"{name}.csv", clips=20)
    args = p.parse_args(argv)
    rows = run_points(args, points)
    bases = {}
    for point_name, point in points.items():
        bases[point_name] = point.base or base
    print(docstring)
    print(table(rows, bases))
    if rows:
        path = args.csv.with_suffix(".svg")
        path.write_text(figure(rows, bases, headline.rstrip(".")), encoding="utf-8")
        print(f"wrote {path}")


def table(rows: Sequence[Row], bases: Mapping[str, str]) -> str:
    """Means at each point, and the paired difference of the correlation from its base, in Markdown."""
    columns = ("correlation", "error_px", "subject", "shape_ok", "color_ok", "seconds", "joules")
    lines = [f"| point | clips | {' | '.join(columns)} | correlation - base | base |", "|---" * 11 + "|"]
    for name, base in bases.items():
        cells = [name, str(clips_at(rows, name))]
        for measure in columns:
            cells.append(mean_text(rows, name, measure))
        cells += [difference_text(paired(rows, name, base, "correlation")), base]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(rows: Sequence[Row], bases: Mapping[str, str], title: str) -> str:
    """The same differences as a forest plot in SVG."""
    effects = []
    for name, base in bases.items():
        cells = [mean_text(rows, name, "correlation"), mean_text(rows, name, "shape_ok"), str(clips_at(rows, name))]
        effects.append(Effect(name, base, paired(rows, name, base, "correlation"), tuple(cells)))
    return forest(
        effects,
        title=title,
        x_title="correlation with the true motion, minus that of the hollow point, clip by clip",
        columns=("correlation", "shapes right", "clips"),
    )


def clips_at(rows: Sequence[Row], name: str) -> int:
    """How many clips ran at a point."""
    return len(values_of(rows, name, "seconds"))
