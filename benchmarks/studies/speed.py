"""Window and span against the speed of the motion.

Hypothesis, written before any run. A window must reach as far as a tile's match can be wrong, not as far as the motion
goes, because it lies around the match: so the correlation at a wide window is that at a narrow one, at every speed. The
span is what fast motion breaks: pairs far apart have no right match once a path has left the window's reach or come
back, so at three times the speed a span of 2 is better than one of 8, and at half the speed the other way round.
Limit: clips are played forth and back to stay 33 frames long, and at half the speed each frame is shown twice.
"""

from dataclasses import replace

import fastvmt
from benchmarks.metrics.points import Point
from benchmarks.studies.clips import frames_at, played
from benchmarks.studies.program import run_study
from wan_mini.runs.cli import run
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT

SPEEDS = (0.5, 1.0, 2.0, 3.0)
# The preset has a window of 5 and a span of 8.
SETTINGS = {"window 3": {"window": 3}, "window 9": {"window": 9}, "span 2": {"span": 2}}


def points() -> dict[str, Point]:
    """Each setting at each speed."""
    _, preset = load_preset(CHECKPOINT, fastvmt.MotionConfig())
    made = {}
    for speed in SPEEDS:
        clip_of = played(frames_at(speed))
        for name, changes in {"preset": {}, **SETTINGS}.items():
            config = replace(preset, **changes)
            base = f"speed {speed:g}, preset"
            made[f"speed {speed:g}, {name}"] = Point(config, clip_of, f"speed {speed:g}", base=base)
    return made


def program(argv: list[str] | None = None) -> None:
    """Run what the CSV lacks, print the table."""
    run_study("speed", __doc__, points(), "speed 1, preset", argv)


if __name__ == "__main__":
    raise SystemExit(run(program))
