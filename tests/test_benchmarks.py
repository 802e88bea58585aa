"""The benchmarks still run and end with their line of JSON; what they measure here, between tests, is worth nothing."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import amf, common, dit, gradient, growth, models, vae, whole


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A clip of five frames for the tiny model, and ceilings of small products."""
    size = models.SIZES["tiny"]
    motion = replace(size.motion, height=64, width=96, frames=17)
    monkeypatch.setitem(models.SIZES, "tiny", replace(size, motion=motion))
    monkeypatch.setattr(gradient, "REUSED", 2)
    monkeypatch.setattr(common.Bench, "matmul_ceiling", lambda self, dtype: 1.0)
    monkeypatch.setattr(common.Bench, "copy_ceiling", lambda self: 1.0)


def result(capsys) -> dict:
    *table, line = capsys.readouterr().out.strip().splitlines()
    assert any("time x" in row for row in table)
    return json.loads(line)


def test_gradient(capsys):
    """It stops by itself if the schedules give different gradients."""
    gradient.main(["--size", "tiny", "--repeats", "1", "--device", "cpu"])
    found = result(capsys)
    assert set(gradient.WAYS) < set(found["rows"]) and found["rows"]["ours"]["to"] == "released schedule"
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in found["rows"].values())
    assert found["machine"]["torch"] == torch.__version__ and found["settings"]["size"] == "tiny"


def test_amf(capsys):
    amf.main(["--size", "tiny", "--repeats", "1", "--device", "cpu", "--frames", "3", "6"])
    found = result(capsys)
    assert found["rows"]["windowed, F=6"]["to"] == "dense, all at once, F=6"
    assert "windowed, exponent of time" in found["facts"]


def test_growth(capsys, monkeypatch):
    for name, values in {"FRAMES": (9, 17), "LONG": 17, "SCALES": (1,), "SPANS": (1, 2), "WINDOWS": (3,)}.items():
        monkeypatch.setattr(growth, name, values)
    growth.main(["--size", "tiny", "--repeats", "1", "--device", "cpu"])
    found = result(capsys)
    rows = {"run, latent frames 5", "flow, window 3", "gradient, span 2", "run, tokens a frame 24"}
    assert rows <= set(found["rows"])
    assert found["facts"]["gradient with latent frames, exponent of memory"] > 0
    assert common.slope([(1, 3.0), (2, 12.0), (4, 48.0)]) == pytest.approx(2)


@pytest.mark.parametrize(
    "table, row, to",
    [
        (dit, "ours", "diffusers"),
        (vae, "decode, ours", "decode, diffusers"),
        (whole, "run, ours", "run, released guidance"),
    ],
    ids=["dit", "vae", "whole"],
)
def test_models(capsys, monkeypatch, table, row, to):
    """They stop by themselves if ours and diffusers' compute different things."""
    monkeypatch.setattr(dit, "compile_blocks", lambda model: None)
    table.main(["--size", "tiny", "--repeats", "1", "--device", "cpu"])
    rows = result(capsys)["rows"]
    assert rows[row]["to"] == to and rows[row]["time_ratio"] > 0


def test_rows_take_turns_with_their_reference(capsys, monkeypatch):
    """A ratio is to the reference's calls between the row's own, not to those of its own row."""
    costs = iter([9.0, 9.0, 9.0, 2.0, 6.0, 4.0, 20.0, 8.0, 16.0])  # three alone, then three turns: 3, 5 and 2 times
    monkeypatch.setattr(common, "stopwatch", lambda call, backend: next(costs))
    monkeypatch.setattr(common, "ENOUGH", 1e3)
    monkeypatch.setattr(common, "SHORT", 9.0)
    bench = common.Bench("turns", common.parser("Turns.").parse_args(["--device", "cpu", "--repeats", "3"]))
    bench.row("reference", lambda: None)
    bench.row("row", lambda: None, to="reference", times=2)
    bench.finish()
    rows = result(capsys)["rows"]
    assert rows["row"]["seconds"] == 8 and rows["row"]["to"] == "reference"
    assert rows["row"]["time_ratio"] == 1.5  # the median 3, for two at once


def test_what_cannot_be_measured_is_a_dash(capsys):
    bench = common.Bench("nothing", common.parser("Nothing.").parse_args(["--device", "cpu"]))

    def fail():
        raise torch.OutOfMemoryError

    bench.row("too large", fail)
    bench.row("sleep", lambda: None, to="too large")
    bench.finish()
    rows = result(capsys)["rows"]
    assert rows["too large"] == {"seconds": None, "note": "out of memory"} and rows["sleep"]["time_ratio"] is None
