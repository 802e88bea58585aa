"""The benchmarks still run and end with their line of JSON; what they measure here, between tests, is worth nothing."""

import json
import subprocess

import pytest
import torch

import benchmarks.__main__ as index
from benchmarks.speed import __main__ as all_tables
from benchmarks.speed import amf, bench, dit, full_run, gradient, measure, random_models, scaling, vae


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A rehearsal's clip and two steps for the tiny model, and ceilings of small products."""
    size = random_models.named_size(random_models.REHEARSAL)
    monkeypatch.setattr(bench, "named_size", lambda name: size)
    monkeypatch.setattr(gradient, "REUSED", 2)
    monkeypatch.setattr(bench.Bench, "matmul_ceiling", lambda self, dtype: 1.0)
    monkeypatch.setattr(bench.Bench, "copy_ceiling", lambda self: 1.0)


def result(capsys) -> dict:
    *rows, line = capsys.readouterr().out.strip().splitlines()
    assert any("time x" in row for row in rows)
    return json.loads(line)


def test_gradient(capsys):
    """It stops by itself if the schedules give different gradients."""
    gradient.main(["--size", "rehearsal", "--repeats", "1", "--device", "cpu"])
    printed = result(capsys)
    assert (
        set(gradient.SCHEDULES) < set(printed["rows"]) and printed["rows"]["ours"]["reference"] == "released schedule"
    )
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in printed["rows"].values())
    assert printed["machine"]["torch"] == torch.__version__ and printed["settings"]["size"] == "rehearsal"


def test_amf(capsys):
    amf.main(["--size", "tiny", "--repeats", "1", "--device", "cpu", "--frames", "3", "6"])
    printed = result(capsys)
    assert printed["rows"]["windowed, F=6"]["reference"] == "dense, all at once, F=6"
    assert "windowed, exponent of time" in printed["results"]


def test_scaling(capsys, monkeypatch):
    for name, values in {"FRAMES": (9, 17), "LONG": 17, "SCALES": (1,), "SPANS": (1, 2), "WINDOWS": (3,)}.items():
        monkeypatch.setattr(scaling, name, values)
    scaling.main(["--size", "rehearsal", "--repeats", "1", "--device", "cpu"])
    printed = result(capsys)
    rows = {"run, latent frames 5", "flow, window 3", "gradient, span 2", "run, tokens a frame 24"}
    assert rows <= set(printed["rows"])
    assert printed["results"]["gradient with latent frames, exponent of memory"] > 0
    assert measure.exponent([(1, 3.0), (2, 12.0), (4, 48.0)]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("table", "row", "to"),
    [
        (dit, "ours", "diffusers"),
        (vae, "decode, ours", "decode, diffusers"),
        (full_run, "run, ours", "run, released guidance"),
    ],
    ids=["dit", "vae", "full_run"],
)
def test_models(capsys, monkeypatch, table, row, to):
    """They stop by themselves if ours and diffusers' compute different things."""
    monkeypatch.setattr(dit, "compile_blocks", lambda model, **options: None)
    table.main(["--size", "rehearsal", "--repeats", "1", "--device", "cpu"])
    rows = result(capsys)["rows"]
    assert rows[row]["reference"] == to and rows[row]["time_ratio"] > 0


def test_rows_alternate_with_their_reference(capsys, monkeypatch):
    """A ratio is to the reference's calls between the row's own, not to those of its own row."""
    costs = iter([9.0, 9.0, 9.0, 2.0, 6.0, 4.0, 20.0, 8.0, 16.0])  # three alone, then three pairs: 3, 5 and 2 times
    monkeypatch.setattr(measure, "stopwatch", lambda call, backend: next(costs))
    monkeypatch.setattr(measure, "ENOUGH", 1e3)
    monkeypatch.setattr(bench, "SHORT", 9.0)
    table = bench.Bench("pairs", bench.build_parser("Pairs.").parse_args(["--device", "cpu", "--repeats", "3"]))
    table.row("reference", lambda: None)
    table.row("row", lambda: None, reference="reference", times=2)
    table.finish()
    rows = result(capsys)["rows"]
    assert rows["row"]["seconds"] == 8 and rows["row"]["reference"] == "reference"
    assert rows["row"]["time_ratio"] == 1.5  # the median 3, for two at once


def test_what_cannot_be_measured_is_a_dash(capsys):
    table = bench.Bench("nothing", bench.build_parser("Nothing.").parse_args(["--device", "cpu"]))

    def fail():
        raise torch.OutOfMemoryError

    table.row("too large", fail)
    table.row("sleep", lambda: None, reference="too large")
    table.finish()
    rows = result(capsys)["rows"]
    assert rows["too large"] == {"seconds": None, "note": "out of memory"} and rows["sleep"]["time_ratio"] is None


def test_index_lists_every_program(capsys):
    """By module name, as it is started, with the first line of its docstring; helpers are not listed."""
    index.main([])
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("python -m benchmarks.speed")
    assert lines[at + 1].strip() == (all_tables.__doc__ or "").splitlines()[0]
    assert not any("measure" in line or "__main__" in line for line in lines if line.startswith("python"))


def test_every_table_has_a_program_that_knows_its_flags():
    for table in all_tables.GPU_TABLES + all_tables.CPU_TABLES:
        name, *flags = table.split()
        assert (all_tables.ROOT / "benchmarks" / "speed" / f"{name}.py").exists()
        if "--size" in flags:
            assert flags[flags.index("--size") + 1] in random_models.SIZE_NAMES


def test_failed_tables_are_named_and_the_others_kept(tmp_path, monkeypatch, capsys):
    """The last line that a program prints is its JSON; a program that fails gives no line and exit status 1."""

    def fake_run(command, **options):
        failed = "amf" in command[2]
        return subprocess.CompletedProcess(command, int(failed), "a table\n" + json.dumps({"module": command[2]}))

    monkeypatch.setattr(all_tables.subprocess, "run", fake_run)
    monkeypatch.setattr(all_tables, "CPU_TABLES", ("gradient --size tiny", "amf --size tiny"))
    out = tmp_path / "new" / "rows.jsonl"
    assert all_tables.main(["--device", "cpu", "--out", str(out)]) == 1
    assert [json.loads(line)["module"] for line in out.read_text().splitlines()] == ["benchmarks.speed.gradient"]
    printed = capsys.readouterr().out
    assert printed.count("a table") == 2 and "without amf --size tiny, which failed" in printed


def test_unknown_device_is_one_line(capsys):
    with pytest.raises(SystemExit) as status:
        all_tables.main(["--device", "abacus"])
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "device abacus is not available here" in error
