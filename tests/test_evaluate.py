"""The evaluation: its clips, rows and table, and the whole command."""

import csv
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks

import fastvmt
from benchmarks import evaluate
from benchmarks.evaluate import (
    COLUMNS,
    METHODS,
    classifier_accuracy,
    clip_seeds,
    mean_with_interval,
    start_csv,
    table,
    write_rows,
)
from wan_mini.errors import UserError
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.world import KINDS, Clip, make_clip, other_scene, score


def test_any_seed_gives_its_own_clips():
    assert clip_seeds(5, 8) == clip_seeds(5, 12)[:8]
    seen = [number for seed in (-1, 0, 1, 10**30) for number, _ in clip_seeds(seed, 50)]
    assert len(set(seen)) == 200
    assert [kind for _, kind in clip_seeds(0, 5)] == [*KINDS, KINDS[0]]


def test_rows_and_table(tmp_path):
    """One row a clip and method, the CSV's columns as promised, and intervals around the means."""

    def generate(clip: Clip, prompt: str, method: str, seed: int) -> tuple[np.ndarray, int]:
        assert prompt == other_scene(clip, seed).caption
        return (clip.frames, 4) if method == "fastvmt" else (clip.frames[::-1], 0)

    start_csv(tmp_path / "rows.csv")
    rows = write_rows(evaluate.evaluate(generate, ["none", "fastvmt"], clip_seeds(2, 2)), tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.reader(file))
    assert lines[0] == list(COLUMNS)
    assert ",".join(COLUMNS) == (
        "clip,kind,method,correlation,error_px,direction,fidelity,color_ok,background_ok,shape_ok,leak,gradients,seconds"
    )
    assert [line[1:3] for line in lines[1:]] == [[k, m] for k in KINDS[:2] for m in ("none", "fastvmt")]
    (number, kind), _ = clip_seeds(2, 2)
    clip = make_clip(number, kind, "held-out")
    scores = score(clip.frames, clip, other_scene(clip, number))
    assert lines[2][:2] == [str(number), kind]
    expected = [float(scores[name]) for name in COLUMNS[3:11]]
    assert [float(cell) for cell in lines[2][3:11]] == pytest.approx(expected, abs=1e-4)
    assert (lines[2][7], lines[2][10], lines[2][11]) == ("0", "1", "4")  # the clip itself: its own color leaks
    last = [line.split()[:3] for line in table(rows).splitlines()[-2:]]
    assert last == [["all", "none", "2"], ["all", "fastvmt", "2"]]


def test_an_interval_by_its_formula():
    """Of 0, 1 and 48 times 1/2, and a value that is not defined: 1.96 * 0.1 / sqrt(50) = 0.028."""
    made_up = [{"kind": "single", "method": "x", "a": a} for a in (0.0, 1.0, np.nan, *[0.5] * 48)]
    assert table(made_up, ["a"]).splitlines()[-1].split() == ["all", "x", "51", "0.50", "±0.03"]
    assert mean_with_interval(np.array([np.nan])) == "-"
    assert mean_with_interval(np.array([0.25, np.nan])) == "0.25"  # of one clip there is no interval


def test_a_cell_of_the_table_does_not_depend_on_the_others():
    some = [{"kind": "single", "method": "x", "a": float(a**3)} for a in range(20)]
    more = [{**row, "method": "y"} for row in some[:7]] + some
    assert table(some, ["a"]).splitlines()[-1].split() == table(more, ["a"]).splitlines()[-1].split()


def test_methods_change_fields_of_the_config():
    _, preset = load_preset(CHECKPOINT, fastvmt.MotionConfig())
    for name, changes in METHODS.items():
        assert (replace(preset, **changes) == preset) == (name == "fastvmt"), name


def test_program(wan, folder, tmp_path, monkeypatch, capsys):
    """The whole command on a random model, of a method that copies the clip."""
    folder = Path(shutil.copytree(folder, tmp_path / "model"))
    shutil.copyfile(CHECKPOINT / "motion.json", folder / "motion.json")
    _, preset = load_preset(CHECKPOINT, fastvmt.MotionConfig())
    calls = []
    clips = []

    def transfer(wan, clip, prompt, config, *, seed, device):
        calls.append((seed, config))
        clips.append(clip)
        return fastvmt.Transfer(latents=None, flows=(None, None), report={"gradients": 7}, frames=clip)

    monkeypatch.setattr(fastvmt, "transfer", transfer)
    rows_file = tmp_path / "rows.csv"
    flags = ["--model", str(folder), "--clips", "1", "--classifier-clips", "4", "--device", "cpu"]
    flags += ["--csv", str(rows_file)]
    evaluate.program([*flags, "--methods", "none,interval1"])
    number = clip_seeds(0, 1)[0][0]
    assert calls == [(number, replace(preset, amf="none")), (number, replace(preset, interval=1))]
    printed = capsys.readouterr().out
    assert printed.index("the attribute classifier on real clips") < printed.index("motion transfer")
    with rows_file.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["gradients"]) for row in rows] == [("none", "7"), ("interval1", "7")]
    kept = rows_file.read_bytes()
    with pytest.raises(UserError, match="rows.csv exists already: choose another --csv"):
        evaluate.program(flags)
    assert rows_file.read_bytes() == kept
    rows_file.unlink()
    flags += ["--seed", "3", "--split", "train"]
    evaluate.program([*flags, "--methods", "none", "--vary", "block=1", "tau=5 lr=0.1,0.2"])
    ((number, kind),) = clip_seeds(3, 1)
    assert [seed for seed, _ in calls[2:]] == [number] * 3
    assert np.array_equal(clips[-1], make_clip(number, kind, "train").frames)
    assert [config for _, config in calls[3:]] == [replace(preset, block=1), replace(preset, tau=5.0, lr=(0.1, 0.2))]
    with rows_file.open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["none", "block=1", "tau=5 lr=0.1,0.2"]
    assert "1 train clips of seed 3" in capsys.readouterr().out


def test_two_processes_share_the_clips(folder, tmp_path, monkeypatch):
    """Each row once, in one file and one table; a clip that fails is named, the others go on, both end with 1."""
    folder = Path(shutil.copytree(folder, tmp_path / "model"))
    shutil.copyfile(CHECKPOINT / "motion.json", folder / "motion.json")
    clips = [number for number, _ in clip_seeds(0, 4)]

    def transfer(wan, clip, prompt, config, *, seed, device):
        time.sleep(0.2)  # so that no process takes all
        if seed == clips[1]:
            raise RuntimeError("out of\nluck")
        return fastvmt.Transfer(latents=None, flows=(None, None), report={"gradients": 7}, frames=clip)

    monkeypatch.setattr(fastvmt, "transfer", transfer)
    flags = ["--model", str(folder), "--clips", "4", "--classifier-clips", "1", "--device", "cpu"]
    flags += ["--methods", "none", "--csv", str(tmp_path / "rows.csv")]
    codes, printed = run_ranks(2, flags, tmp_path / "log", evaluate.program)
    assert codes == [1, 1], printed
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["clip"]) for row in rows) == sorted([clips[0], *clips[2:]])
    errors = [line for text in printed for line in text.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: clip {clips[1]}: out of luck"]
    assert printed[0].splitlines()[-1].split()[:3] == ["all", "none", "3"]
    assert "motion transfer" not in printed[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vary", "color=red"], "--vary needs one of steps"),
        (["--methods", "none,nine"], "--methods none,nine: choose from none,dense,fastvmt"),
        (["--clips", "0"], "--clips 0, --classifier-clips 100: give at least 1 each"),
    ],
)
def test_what_cannot_be_done_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        evaluate.program(flags)


def test_classifier_is_right_on_the_stream_it_prints():
    assert all(row["color_ok"] and row["shape_ok"] and row["background_ok"] for row in classifier_accuracy(0, 8))
