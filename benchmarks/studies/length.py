"""Longer clips, and twice the grid.

Hypothesis, written before any run. The flow's pairs stay within the span, so guidance works as well at 81 frames as at
33 if the model can sample so long at all. The tiny model was trained on 33 frames of 128x192, so the sampler is what
fails, in shapes before motion. Twice the grid is further out of its distribution, and worse.
Limit: longer clips go forth and back, so their second half repeats the first; the larger ones are enlarged pixels.
"""

import fastvmt
from benchmarks.metrics.points import Point
from benchmarks.studies.clips import frames_at, played
from benchmarks.studies.program import run_study
from wan_mini.runs.cli import run
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT

LENGTHS = (17, 33, 49, 65, 81)


def points() -> dict[str, Point]:
    """Every length at the world's size; the usual length at twice the size."""
    _, preset = load_preset(CHECKPOINT, fastvmt.MotionConfig())
    made = {}
    for length in LENGTHS:
        made[f"{length} frames"] = Point(preset, played(frames_at(1.0, length)), f"{length} frames")
    made["33 frames, twice the grid"] = Point(preset, scale=2)
    return made


def program(argv: list[str] | None = None) -> None:
    """Run what the CSV lacks, print the table."""
    run_study("length", __doc__, points(), "33 frames", argv)


if __name__ == "__main__":
    raise SystemExit(run(program))
