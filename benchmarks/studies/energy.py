"""Joules of a transfer.

Hypothesis, written before any run. Energy follows the operations: the fast preset takes the same share of the default's
joules as of its operations, within a tenth, because both keep the machine equally busy.
Limit: counters are of whole packages and GPUs, whoever uses them, so the machine must be idle; where they cannot be
read (most virtual machines), there is a dash.
"""

from dataclasses import replace

import fastvmt
from benchmarks.metrics.points import Point
from benchmarks.studies.program import run_study
from wan_mini.runs.cli import run
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT


def points() -> dict[str, Point]:
    """Plain sampling, the default, the fast preset."""
    _, preset = load_preset(CHECKPOINT, fastvmt.MotionConfig())
    fast = replace(preset, **fastvmt.PRESETS["fast"])
    return {"plain sampling": Point(replace(preset, amf="none")), "default": Point(preset), "fast": Point(fast)}


def program(argv: list[str] | None = None) -> None:
    """Run what the CSV lacks, print the table."""
    run_study("energy", __doc__, points(), "default", argv)


if __name__ == "__main__":
    raise SystemExit(run(program))
