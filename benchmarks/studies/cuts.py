"""A reference that cuts to another scene, and one that is partly hidden.

Hypothesis, written before any run. Across a cut every token has a best match, and it is meaningless: so a reference
that cuts before frame 17 is followed worse in its first 17 frames than the same frames alone, which the detector
(wan_mini/cuts.py) finds and splits off. Behind an occluder matches are lost where it is and found again after it: the
correlation falls, but by less than half, because the windows' anchors and the model's own idea of motion bridge it.
Limit: the cut is hard and between scenes of one kind; the occluder is a gray bar that rests.
"""

import fastvmt
from benchmarks.metrics.points import Point
from benchmarks.studies.clips import CUT, occluded, played, with_cut
from benchmarks.studies.program import run_study
from wan_mini.cuts import split_at_cuts
from wan_mini.runs.cli import run
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.world import Clip, make_clip


def first_scene(seed: int, kind: str, split: str) -> Clip:
    """What the detector splits off a clip with a cut, with the truth about its frames."""
    frames = split_at_cuts(with_cut(seed, kind, split).frames)[0]
    return make_clip(seed, kind, split, range(len(frames)))


def points() -> dict[str, Point]:
    """The first frames of a whole clip, of a cut one, of what is split off; and a whole clip, seen and hidden."""
    _, preset = load_preset(CHECKPOINT, fastvmt.MotionConfig())
    return {
        "no cut": Point(preset, scored=CUT),
        "across the cut": Point(preset, with_cut, "cut", scored=CUT),
        "split by the detector": Point(preset, first_scene, "first scene", scored=CUT),
        "split by hand": Point(preset, played(range(CUT)), "first frames", scored=CUT),
        "seen": Point(preset, base="seen"),
        "occluded": Point(preset, occluded, "occluded", base="seen"),
    }


def program(argv: list[str] | None = None) -> None:
    """Run what the CSV lacks, print the table."""
    run_study("cuts", __doc__, points(), "no cut", argv)


if __name__ == "__main__":
    raise SystemExit(run(program))
