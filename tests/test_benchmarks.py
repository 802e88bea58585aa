"""The benchmarks still run and end with their line of JSON; what they measure here, between tests, is worth nothing."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import amf, common, gradient, models


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


def test_what_cannot_be_measured_is_a_dash(capsys):
    bench = common.Bench("nothing", common.parser("Nothing.").parse_args(["--device", "cpu"]))

    def fail():
        raise torch.OutOfMemoryError

    bench.row("too large", fail)
    bench.row("sleep", lambda: None, to="too large")
    bench.finish()
    rows = result(capsys)["rows"]
    assert rows["too large"] == {"seconds": None, "note": "out of memory"} and rows["sleep"]["time_ratio"] is None
