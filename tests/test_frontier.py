"""The frontier: its points, the operations behind its axes, paired differences, a run that goes on, the figure."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastvmt
from benchmarks import frontier
from benchmarks.evaluate import clip_seeds
from benchmarks.frontier import (
    GRID,
    POINTS,
    RELEASE,
    Operations,
    config_of,
    operations,
    predicted,
    released_gradient,
    tiny_operations,
)
from benchmarks.metrics.points import (
    MEASURES,
    Point,
    settings_of_point,
)
from benchmarks.metrics.rows import append_rows, difference_text, paired, read_rows, values_of
from benchmarks.metrics.scatter import Mark, label_positions
from benchmarks.metrics.scatter import frontier as undominated
from benchmarks.metrics.svg import ticks
from benchmarks.studies.program import table as study_table
from fastvmt import MotionConfig
from wan_mini.config import T2V_1_3B, T2V_14B
from wan_mini.errors import UserError
from wan_mini.load import load_wan
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT


def row(clip, name, **measures):
    return {"clip": clip, "kind": "single", "method": name, "settings": "x"} | dict.fromkeys(MEASURES, 0.5) | measures


def test_points_differ_and_suit_every_model():
    assert len(POINTS) >= 20
    for preset, layers in ((MotionConfig(), 30), (MotionConfig(), 40), (load_preset(CHECKPOINT, MotionConfig())[1], 6)):
        configs = [config_of(preset, changes, layers) for changes in POINTS.values()]
        assert (
            configs[1] == preset and len(set(configs)) >= len(configs) - 1
        )  # the release's reference may be the model's
    half = config_of(MotionConfig(), POINTS["half the share, as far"], 30)
    assert (half.guided_steps, half.lr) == (5, (0.006, 0.004))
    assert config_of(MotionConfig(), POINTS["block 2"], 30).block == 10


def test_operations_of_the_published_schedule():
    """Counted by hand from its code at 1.3B: 709.0 TFLOP a gradient, 58.5 PFLOP a run; ours 45.8 without the flow."""
    assert released_gradient(T2V_1_3B, 32760, 14) / 1e12 == pytest.approx(709.0, abs=0.1)
    config = MotionConfig()
    assert operations(config, T2V_1_3B, GRID, released=True).total / 1e15 == pytest.approx(58.5, abs=0.06)
    assert operations(config, T2V_1_3B, GRID).total / 1e15 == pytest.approx(45.8 + 0.07, abs=0.05)
    assert operations(replace(config, amf="none"), T2V_14B, GRID) == Operations(0, pytest.approx(167.8e15, rel=1e-3))


def test_what_depends_on_the_data_saves_the_same_share():
    """A cache that computed 20 of 50 passes on the tiny model computes 40 of 100 on a large one."""
    most = operations(MotionConfig(), T2V_1_3B, GRID)
    got = predicted("cache 0.1", T2V_1_3B, Operations(60, 50), Operations(60, 20), POINTS)
    assert got == pytest.approx(most.guidance + 0.4 * most.denoising)
    got = predicted("stop at 0.7", T2V_1_3B, Operations(60, 50), Operations(15, 50), POINTS)
    assert got == pytest.approx(0.25 * most.guidance + most.denoising)
    released = predicted(RELEASE, T2V_1_3B, Operations(60, 50), Operations(1, 1), POINTS)
    assert released / 1e15 == pytest.approx(58.5, abs=0.06)


def test_differences_are_paired():
    """Clips differ by 0.5, the points on each of them by 0.1: the interval knows of the latter alone."""
    rows = []
    for clip in range(20):
        rows += [row(str(clip), "a", correlation=clip / 40 + 0.1), row(str(clip), "b", correlation=clip / 40)]
    rows += [row("a only", "a", correlation=9.0), row("0 undefined", "b", correlation=np.nan)]
    mean, low, high = paired(rows, "a", "b", "correlation")
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))
    assert difference_text((mean, low, high)) == "+0.10 [+0.10, +0.10]"
    assert paired(rows, "a", "c", "correlation") is None and difference_text(None) == "-"
    line = study_table(rows, {"a": "b", "c": "b"}).splitlines()[2:]
    assert line[0].startswith("| a | 21 |") and line[1] == "| c | 0 " + "| - " * 8 + "| b |"


def test_only_undominated_points_are_the_frontier():
    marks = [
        Mark(str(n), x, y, 0, "") for n, (x, y) in enumerate([(1, 0.9), (0.5, 0.8), (0.7, 0.7), (0.5, 0.6), (2, 0.9)])
    ]
    assert [mark.name for mark in undominated(marks)] == ["1", "0"]
    assert ticks(-0.05, 0.41, 0.2) == pytest.approx([0, 0.2, 0.4]) and ticks(0.2, 0.6, 0.2) == pytest.approx(
        [0.2, 0.4, 0.6]
    )


def copies(calls):
    """A transfer that copies the clip."""

    def transfer(wan, clip, prompt, config, *, seed):
        calls.append((seed, config))
        flops = {"guidance": 6e9, "flow": 1e9, "denoising": 3e9}
        report = {"gradients": 4, "passes": [2, 1], "flops": flops}
        return fastvmt.Transfer(latents=None, flows=(None, None), report=report, frames=clip)

    return transfer


def test_numbers_of_neighbors_do_not_cover_one_another():
    points = [(100.0, 100.0), (104.0, 103.0), (98.0, 110.0), (300.0, 100.0)]
    labels = label_positions(points)
    assert labels[0] == (109, 93) and labels[3] == (309, 93)
    for number, (x, y) in enumerate(labels):
        for other_x, other_y in labels[:number]:
            assert abs(x - other_x) >= 18 or abs(y - other_y) >= 12


def test_a_run_that_goes_on(tmp_path, monkeypatch, capsys):
    """Two points, then three: one row each, the rest dashes; the figure has all that was run, and the limits."""
    calls = []
    monkeypatch.setattr(fastvmt, "transfer", copies(calls))
    file = tmp_path / "rows.csv"
    flags = ["--clips", "1", "--device", "cpu", "--csv", str(file)]
    frontier.program([*flags, "--points", "default", "plain sampling"])
    frontier.program([*flags, "--points", "default", "plain sampling", "fast"])
    seed, _ = clip_seeds(0, 1)[0]
    assert [(number, config.cache) for number, config in calls] == [(seed, 0), (seed, 0), (seed, 0.2)]
    rows = read_rows(file, MEASURES)
    assert [r["method"] for r in rows] == ["default", "plain sampling", "fast"]
    assert (rows[0]["guidance_gflop"], rows[0]["denoising_gflop"], rows[0]["passes"]) == (7, 3, 3)
    assert rows[0]["correlation"] > 0.8  # the reference itself
    shown = capsys.readouterr().out
    assert shown.count("| fast | 1 |") == 1 and "| dense | 0 | - |" in shown
    drawing = ET.fromstring(file.with_suffix(".svg").read_text())
    texts = ["".join(node.itertext()) for node in drawing.iter() if node.tag.endswith("text")]
    assert {"1  plain sampling", "2  default", "3  fast", "limit: guidance for nothing"} < set(texts)
    frontier.program([*flags, "--show"])
    assert len(calls) == 3
    append_rows(iter([row("1", "dense")]), file, MEASURES)
    with pytest.raises(UserError, match="rows of dense with other options or weights"):
        frontier.program(flags)


def test_the_results_that_ship():
    """At least 20 points of 24 clips or more, by today's options and weights; the fast preset is cheap and good."""
    rows = read_rows(frontier.RESULTS, MEASURES)
    _, preset = load_preset(CHECKPOINT, MotionConfig())
    hashes = load_wan(CHECKPOINT, device="cpu", dtype=torch.float32).hashes
    settings = {}
    for name, changes in POINTS.items():
        settings[name] = settings_of_point(Point(config_of(preset, changes, 6)), hashes)
    assert all(row["settings"] == settings[row["method"]] for row in rows)
    assert sum(len(values_of(rows, name, "seconds")) >= 24 for name in POINTS) >= 20
    planned, spent = tiny_operations("fast", rows, preset)
    default, _ = tiny_operations("default", rows, preset)
    assert spent is not None and spent.total <= 0.5 * default.total
    assert predicted("fast", T2V_1_3B, planned, spent, POINTS) <= 23e15
    difference = paired(rows, "fast", "default", "correlation")
    assert difference is not None and difference[1] >= -0.05


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--points", "nine"], "--points nine: choose from plain sampling; "), (["--clips", "0"], "--clips 0")],
)
def test_what_cannot_be_done_is_refused(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        frontier.program([*flags, "--csv", str(tmp_path / "rows.csv")])
