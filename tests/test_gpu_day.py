"""The kit for a day with a GPU: it goes on where it stopped, within its minutes; and its rehearsal."""

import json
import time

import pytest

from benchmarks import gpu_day
from benchmarks.gpu_day import Step, run_stage
from benchmarks.speed import random_models


def steps(*codes: str) -> list[Step]:
    return [Step(f"step{number}", ["-c", code]) for number, code in enumerate(codes)]


def test_a_stage_goes_on_where_it_stopped(tmp_path):
    """What is done is not done again; what failed or was stopped is; another command under the same name too."""
    wanted = steps("print('one')", "raise SystemExit(4)", "import time; time.sleep(60)", "print('four')")
    first = run_stage(wanted, tmp_path, "cpu", 0.1, False)
    assert list(first.values()) == ["done", "failed", "stopped", "left"]
    assert (tmp_path / "step0.log").read_text() == "one\n" and not (tmp_path / "step3.log").exists()
    record = json.loads((tmp_path / "step1.json").read_text())
    assert record["outcome"] == "failed" and record["machine"].keys() >= {"device", "torch", "commit", "date"}
    wanted[1:3] = steps("", "print('mended')", "")[1:]
    wanted += [Step("train", ["-c", f"raise SystemExit('paused: {gpu_day.PAUSED}')"])]
    second = run_stage(wanted, tmp_path, "cpu", 1, False)
    assert list(second.values()) == ["done before", "done", "done", "done", "paused"]


@pytest.mark.parametrize(
    ("outcomes", "code"), [(["done"], 0), (["left", "done"], 3), (["paused"], 3), (["stopped", "failed"], 1)]
)
def test_exit_codes(outcomes, code, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "run_stage", lambda *_: dict(enumerate(outcomes)))
    assert gpu_day.main(["check", "--out", str(tmp_path), "--device", "cpu"]) == code


def test_training_goes_on_from_an_earlier_day(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_day, "run_stage", lambda steps, *_: seen.extend(steps) or {})
    state = tmp_path / "before" / "train"
    (state / "work").mkdir(parents=True)
    (state / "work" / "dit.pt").write_text("half-way")
    (state / "train.json").write_text("{}")
    argv = ["train", "--out", str(tmp_path / "day"), "--state", str(state), "--device", "cpu", "--minutes", "9"]
    assert gpu_day.main(argv) == 0
    assert (tmp_path / "day" / "train" / "work" / "dit.pt").read_text() == "half-way"
    assert not (tmp_path / "day/train/train.json").exists()
    (step,) = seen
    assert step.command[step.command.index("--minutes") + 1] == "8"
    assert step.command[step.command.index("--work") + 1] == str(tmp_path / "day/train/work")


def test_every_table_of_the_kit_is_a_program():
    for table in gpu_day.TABLES + gpu_day.REHEARSED_TABLES:
        name, *flags = table.split()
        assert (gpu_day.ROOT / "benchmarks" / "speed" / f"{name}.py").exists()
        assert "--size" not in flags or flags[flags.index("--size") + 1] in random_models.SIZE_NAMES


@pytest.mark.slow
def test_the_rehearsal(tmp_path, capsys):
    """All three stages on a CPU; training pauses, and a second call has nothing else left to do."""
    argv = ["--out", str(tmp_path), "--rehearse"]
    code = gpu_day.main(["check", "speed", "train", *argv])
    logs = [path.read_text()[-2000:] for path in sorted(tmp_path.glob("*/*.log"))]
    assert code == gpu_day.LEFT, "\n".join(logs)
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")}
    paused = records.pop("train")
    assert paused["outcome"] == "paused" and list((tmp_path / "train/work").glob("*.pt*"))
    tables = {"full_run", "full_run-compiled", "full_run-compiled-regions", "full_run-tf32"}
    tables |= {"limits", "gradient", "dit", "vae", "amf"}
    assert records.keys() == tables | {"test_gpu"}
    assert {record["outcome"] for record in records.values()} == {"done"}
    table = json.loads((tmp_path / "speed/limits.log").read_text().splitlines()[-1])
    assert table["settings"]["size"] == random_models.REHEARSAL and "--memory 8" in table["rows"]
    start = time.monotonic()
    assert gpu_day.main(["check", "speed", *argv]) == 0 and time.monotonic() - start < 5
    assert "left" not in capsys.readouterr().out
