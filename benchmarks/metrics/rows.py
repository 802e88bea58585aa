"""Rows of a table of methods: a CSV that a stopped run goes on with, and what is printed of it."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evaluate import bootstrap_interval, mean_with_interval
from wan_mini.errors import UserError

Row = dict[str, Any]
MEASURES = (
    "correlation",
    "error_px",
    "fidelity",
    "published",
    "color_ok",
    "shape_ok",
    "background_ok",
    "leak",
    "subject",
    "temporal",
    "background",
    "smoothness",
    "jerk",
    "dynamic",
    "gradients",
    "seconds",
    "peak_gb",
)
HEAD = ("clip", "kind", "method", "settings")
COLUMNS = (*HEAD, *MEASURES)


def read_rows(path: Path, measures: Sequence[str] = MEASURES) -> list[Row]:
    """Rows of an earlier run, numbers as numbers, NaN where a cell is empty; none if there is no file yet.

    Raises UserError on a file with other columns.
    """
    if not path.exists():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != (*HEAD, *measures):
            raise UserError(f"{path} has other columns than this table: choose another --csv")
        for cells in reader:
            row: Row = dict(cells)
            for name in measures:
                row[name] = float(cells[name] or "nan")
            rows.append(row)
    return rows


def start_rows(path: Path, measures: Sequence[str] = MEASURES) -> None:
    """A file without rows, unless there is one of an earlier run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, (*HEAD, *measures)).writeheader()


def append_rows(rows: Iterator[Row], path: Path, measures: Sequence[str] = MEASURES) -> None:
    """Write each row as soon as it is there, behind those of an earlier run, or of another process of this one."""
    start_rows(path, measures)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*HEAD, *measures), extrasaction="ignore")
        for row in rows:
            cells = {}
            for name, value in row.items():
                number = isinstance(value, (bool, int, float, np.floating))
                cells[name] = f"{value:.6g}" if number and not np.isnan(value) else value
                if number and np.isnan(value):
                    cells[name] = ""
            writer.writerow(cells)
            file.flush()
            print(row["clip"], row["method"], flush=True)


def check_settings(rows: Sequence[Row], settings: Mapping[str, str], path: Path) -> None:
    """Raises UserError if rows of one of these methods were made with other options or weights; {method: settings}."""
    for row in rows:
        if row["settings"] != settings.get(row["method"], row["settings"]):
            raise UserError(f"{path} has rows of {row['method']} with other options or weights: choose another --csv")


def values_of(rows: Sequence[Row], name: str, measure: str) -> dict[str, float]:
    """A measure at one point by the clip; without those where it is not defined."""
    values = {}
    for row in rows:
        if row["method"] == name and not np.isnan(row[measure]):
            values[row["clip"]] = row[measure]
    return values


def paired(rows: Sequence[Row], name: str, base: str, measure: str) -> tuple[float, float, float] | None:
    """Mean difference of a point from another on the clips of both, and its 95 % interval; None without such clips."""
    own = values_of(rows, name, measure)
    others = values_of(rows, base, measure)
    differences = np.array([own[clip] - others[clip] for clip in own if clip in others])
    if not len(differences):
        return None
    low, high = bootstrap_interval(differences)
    return float(differences.mean()), low, high


def difference_text(difference: tuple[float, float, float] | None) -> str:
    """A paired difference as it stands in a table."""
    if difference is None:
        return "-"
    mean, low, high = difference
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def mean_cell(rows: Sequence[Row], measure: str) -> str:
    """A mean with half of a 95 % interval; a dash where nothing was measured.

    A mean over some of the rows, because the measure is not defined for all, ends with their number.
    """
    values = np.array([row[measure] for row in rows], dtype=float)
    count = np.count_nonzero(~np.isnan(values))
    return mean_with_interval(values) + (f" ({count})" if 0 < count < len(rows) else "")


def table(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """Means over all clips, in Markdown (`mean_cell`), and the correlation's paired difference from FastVMT's."""
    chance = dict.fromkeys(row["method"] for row in rows if not row["settings"])
    heads = ["method", "clips", "correlation - fastvmt's", *MEASURES]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in [*methods, *chance]:
        group = [row for row in rows if row["method"] == method]
        cells = [method, str(len(group)), difference_text(paired(rows, method, "fastvmt", "correlation"))]
        cells += [mean_cell(group, name) for name in MEASURES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ranks(rows: Sequence[Row]) -> list[str]:
    """FastVMT's place by correlation (most first) and by seconds (least first), on the clips that every method has."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["settings"]))
    if "fastvmt" not in methods:
        return []
    clips = set.intersection(*({row["clip"] for row in rows if row["method"] == name} for name in methods))
    if not clips:
        return []
    lines = []
    for name, sign in (("correlation", -1), ("seconds", 1)):
        means = {}
        for method in methods:
            values = [row[name] for row in rows if row["method"] == method and row["clip"] in clips]
            means[method] = sign * float(np.nanmean(values))
        rank = sorted(means, key=means.__getitem__).index("fastvmt") + 1
        lines.append(f"fastvmt is number {rank} of {len(methods)} by {name}, on {len(clips)} clips")
    return lines
