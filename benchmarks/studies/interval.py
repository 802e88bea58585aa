"""Gradient interval against learning rate.

Hypothesis, written before any run. A repeated gradient moves each element of the latents by the rate, so
what counts is the travel, the sum of rate x updates: an interval of 10 at a rate is as good as one of 3 as long as the
travel is the same, and twice the rate at half the updates is the same run. A rate of four times the preset's is too
far whatever the interval (notebook 09).
Limit: the travel is a bound; with fresh gradients, updates partly cancel.
"""

from dataclasses import replace

import fastvmt
from benchmarks.metrics.points import Point
from benchmarks.studies.program import run_study
from wan_mini.runs.cli import run
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT

INTERVALS = (1, 3, 10)
FACTORS = (0.5, 1.0, 2.0, 4.0)


def points() -> dict[str, Point]:
    """Each interval at each factor of the preset's rates; and half the updates at twice the rate."""
    _, preset = load_preset(CHECKPOINT, fastvmt.MotionConfig())
    made = {}
    for interval in INTERVALS:
        for factor in FACTORS:
            lr = factor * preset.lr[0], factor * preset.lr[1]
            made[f"interval {interval}, rate x {factor:g}"] = Point(replace(preset, interval=interval, lr=lr))
    lr = 2 * preset.lr[0], 2 * preset.lr[1]
    made["half the updates, rate x 2"] = Point(replace(preset, optim_steps=preset.optim_steps // 2, lr=lr))
    return made


def program(argv: list[str] | None = None) -> None:
    """Run what the CSV lacks, print the table."""
    run_study("interval", __doc__, points(), "interval 3, rate x 1", argv)


if __name__ == "__main__":
    raise SystemExit(run(program))
