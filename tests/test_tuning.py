"""The options that are tried on training clips: what a candidate changes, one training for all its strengths."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from benchmarks import tuning
from benchmarks.metrics.rows import read_rows
from benchmarks.tuning import CANDIDATES, MEASURES, Candidate, options_of
from wan_mini.peers import adapted
from wan_mini.pipeline import Transfer
from wan_mini.runs.cli import run
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.world import make_clip


def test_each_candidate_is_another_set_of_options():
    options = [options_of(candidate, CHECKPOINT, 0.7) for candidate in CANDIDATES.values()]
    assert len(set(map(repr, options))) == len(options)
    for candidate in CANDIDATES.values():
        plain = options_of(replace(candidate, changes={}), CHECKPOINT, 0.7)
        assert options_of(candidate, CHECKPOINT, 0.7) == replace(plain, **candidate.changes)
        assert max(plain.fit_steps) <= 200


@pytest.mark.parametrize("method", ["fym", "motiondirector", "motioninversion", "det"])
def test_a_strength_is_that_of_what_makes_the_video(method):
    config = options_of(Candidate(method, {}), CHECKPOINT, 0.3)
    own = config.strengths if hasattr(config, "strengths") else (0.0, config.adapter_strength)
    assert own == (0.0, 0.3) and config.strength == 1.0


@pytest.fixture
def runs(monkeypatch) -> list[tuple]:
    """Stands for training and sampling: (clip's split and seed, method's options, whether trained, prompts)."""
    seen = []
    made = cache(make_clip)

    def transfer(wan, frames, prompt, config, *, ref_prompt, seed, save, load):
        assert (save is None) != (load is None)
        if save is not None:
            save.write_bytes(b"weights")
        assert (save or load).read_bytes() == b"weights"
        clips = [made(seed, kind, "train") for kind in ("single", "several")]
        assert any(np.array_equal(frames, clip.frames) and clip.caption == ref_prompt != prompt for clip in clips)
        seen.append((seed, config, save is not None))
        return Transfer(None, (), {}, frames)

    monkeypatch.setattr(adapted, "transfer", transfer)
    return seen


def test_a_candidate_is_trained_once_a_clip_and_goes_on_after_a_stop(runs, tmp_path, capsys):
    names = ["motiondirector: motion alone", "det: ten times the rate"]
    words = ["--csv", str(tmp_path / "t.csv"), "--device", "cpu", "--only", *names]
    assert run(tuning.program, [*words, "--clips", "1"]) == 0
    assert [trained for _, _, trained in runs] == [True, False, False] * 2
    assert [config.strengths[1] for _, config, _ in runs[:3]] == [0.7, 1.0, 1.5]
    assert run(tuning.program, [*words, "--clips", "2"]) == 0
    assert len(runs) == 12 and len({seed for seed, _, _ in runs}) == 2
    rows = read_rows(tmp_path / "t.csv", MEASURES)
    assert len(rows) == 12 and all(row["correlation"] > 0.95 for row in rows)  # the reference follows itself
    capsys.readouterr()
    assert run(tuning.program, [*words, "--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6 and any(
        line.startswith("| det: ten times the rate, x 0.7 | 2 | 1.00 ±0.0") for line in lines
    )
    assert len(runs) == 12


def test_rows_of_other_options_are_refused(runs, tmp_path, capsys, monkeypatch):
    words = ["--csv", str(tmp_path / "t.csv"), "--device", "cpu", "--clips", "1", "--only", "det: ten times the rate"]
    assert run(tuning.program, words) == 0
    monkeypatch.setitem(CANDIDATES, "det: ten times the rate", Candidate("det", {"rank": 8}))
    assert run(tuning.program, words) == 2
    assert (
        "has rows of det: ten times the rate, x 0.7 with other options or weights: choose another --csv"
        in capsys.readouterr().err
    )
    assert run(tuning.program, ["--only", "nothing"]) == 2
    assert "got --only nothing: choose from fym: preset; fym: all heads" in capsys.readouterr().err
