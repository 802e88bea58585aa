"""The noise schedule: shift, number of steps, and where guidance ends.

Hypothesis, written before any run. Motion is decided at high noise, so what counts is the noise level at which guidance
ends, not the number of guided steps: a larger shift with the same share of steps guides longer in noise levels' terms
at their upper end only, and changes little; half of the steps cost half and lose little, as long as the travel is kept.
Limit: the tiny model was trained at one shift; others are out of its distribution as samplers, too.
"""

from dataclasses import replace

import fastvmt
from benchmarks.metrics.points import Point
from benchmarks.studies.program import run_study
from wan_mini.runs.cli import run
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT

# The preset has a shift of 3, and guides 20 % of the steps.
SHIFTS = (1.0, 7.0)
SHARES = (0.4, 0.6)


def points() -> dict[str, Point]:
    """Shifts, guided shares at equal travel, and half and twice the steps at equal travel."""
    _, preset = load_preset(CHECKPOINT, fastvmt.MotionConfig())
    made = {"preset": Point(preset)}
    for shift in SHIFTS:
        made[f"shift {shift:g}"] = Point(replace(preset, shift=shift))
    for share in SHARES:
        factor = preset.guidance_fraction / share
        lr = factor * preset.lr[0], factor * preset.lr[1]
        made[f"guided share {share:g}, as far"] = Point(replace(preset, guidance_fraction=share, lr=lr))
    for factor in (0.5, 2.0):
        lr = preset.lr[0] / factor, preset.lr[1] / factor
        made[f"steps x {factor:g}, as far"] = Point(replace(preset, steps=round(factor * preset.steps), lr=lr))
    return made


def program(argv: list[str] | None = None) -> None:
    """Run what the CSV lacks, print the table."""
    run_study("schedule", __doc__, points(), "preset", argv)


if __name__ == "__main__":
    raise SystemExit(run(program))
