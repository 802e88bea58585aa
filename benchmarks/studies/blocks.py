"""Which block's queries and keys are read.

Hypothesis, written before any run. Matches are poor in the first block, where tokens know only their own patch, best in
the middle and no better in the last, as in the paper's Fig. 7; a gradient through fewer blocks is also smoother, so the
block before the best one is as good at the same travel. The cost grows linearly with the block.
Limit: one block at a time; several blocks at once are not built, since each would need a flow and a loss of its own.
"""

from dataclasses import replace

import fastvmt
from benchmarks.metrics.points import Point, run_study
from wan_mini.config import TINY
from wan_mini.runs.cli import run
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT


def points() -> dict[str, Point]:
    """Every block."""
    _, preset = load_preset(CHECKPOINT, fastvmt.MotionConfig())
    made = {}
    for block in range(TINY.num_layers):
        made[f"block {block}"] = Point(replace(preset, block=block))
    return made


def program(argv: list[str] | None = None) -> None:
    """Run what the CSV lacks, print the table."""
    run_study("blocks", __doc__, points(), "block 3", argv)


if __name__ == "__main__":
    raise SystemExit(run(program))
