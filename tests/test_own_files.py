"""A run's own files, as somebody may have changed them: latents, run.json, state and jobs; and names and labels."""

import json
import os
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lasting import at_event, make_latents, make_small

from benchmarks import marks
from fastvmt import main
from wan_mini import generate
from wan_mini.errors import UserError
from wan_mini.runs.cli import run
from wan_mini.runs.folder import load_tensors
from wan_mini.runs.jobs import parse_job, read_lines
from wan_mini.runs.label import label_box, with_label
from wan_mini.runs.report import loss_plot, stage_table
from wan_mini.runs.reserved import lock_file, reserved

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and fork")


small = pytest.fixture(scope="module")(make_small)
latents = pytest.fixture(scope="module")(make_latents)


def one_line(capsys, *words: str) -> str:
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in words), said
    return said


SETTINGS = {
    "ref a number": {"ref": 5},
    "model a number": {"model": 5},
    "loras a number": {"loras": 5},
    "loras of numbers": {"loras": [5]},
    "label a number": {"label": 5},
    "label a list": {"label": ["a"]},
    "stages a number": {"stages": 5},
    "stage a number": {"stages": {"a": 1}},
    "peak a text": {"stages": {"a": {"seconds": 1, "peak_gb": "<script>alert(1)</script>"}}},
    "losses a text": {"losses": "abc"},
    "clip a number": {"clip": 5},
    "clip without a rate": {"clip": {"height": 32, "width": 32, "frames": 5}},
    "rate a text": {"clip": {"height": 32, "width": 32, "frames": 5, "fps": "16"}},
    "seed too large": {"seed": 2**70},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_latents_are_checked_before_anything_is_decoded(latents, tmp_path, capsys, monkeypatch, case):
    tensors, settings = load_tensors(latents)
    damaged = tmp_path / "damaged.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, damaged, {"settings": json.dumps(settings | SETTINGS[case])})
    monkeypatch.setattr("wan_mini.runs.finish.decode_saved", lambda *_: pytest.fail("it was decoded"))
    monkeypatch.setattr(generate, "decode_saved", lambda *_: pytest.fail("it was decoded"))
    model = ["--model", settings["model"], "--decode", str(damaged)]
    assert main([*model, "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, "damaged.safetensors: ", next(iter(SETTINGS[case])))
    assert run(generate.program, [*model, "--out", str(tmp_path / "out.webp")]) == 2
    one_line(capsys, "damaged.safetensors: ")
    assert [file.name for file in tmp_path.iterdir()] == ["damaged.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("name", ["latents", "flow_result"])
def test_latents_of_other_numbers_are_refused(latents, tmp_path, capsys, dtype, name):
    tensors, settings = load_tensors(latents)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()} | {name: tensors[name].to(dtype)}
    save_file(tensors, tmp_path / "damaged.safetensors", {"settings": json.dumps(settings)})
    assert main(["--decode", str(tmp_path / "damaged.safetensors"), "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, f"needs finite numbers of float32, got others in {name}")


@pytest.mark.parametrize("case", SETTINGS)
def test_a_record_beside_latents_is_checked(latents, tmp_path, capsys, case):
    record = json.loads((latents.parent / "run.json").read_text(encoding="utf-8"))
    (tmp_path / "latents.safetensors").write_bytes(latents.read_bytes())
    (tmp_path / "run.json").write_text(json.dumps(record | SETTINGS[case]))
    assert main(["--decode", str(tmp_path / "latents.safetensors"), "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, "run.json: ")
    assert not list(tmp_path.rglob("report.html"))


ANYTHING = [None, True, -1, 5, 0.5, 1e308, 10**30, "", "x", "<script>", [], [5], ["x"], {}, {"a": 5}]
ANYTHING += [{"a": {"b": None}}]


def variants(settings: dict) -> list[dict]:
    """The settings with each field, and each field of an object in them, replaced by anything, or taken away."""
    changed = []
    for name, value in settings.items():
        changed += [settings | {name: other} for other in ANYTHING]
        changed.append({key: kept for key, kept in settings.items() if key != name})
        if isinstance(value, dict):
            changed += [settings | {name: inner} for inner in variants(value)]
    return changed


@pytest.mark.parametrize("file", ["latents.safetensors", "run.json"])
def test_whatever_a_runs_files_hold_is_one_line_or_a_result(latents, tmp_path, capsys, monkeypatch, file):
    """Some 150 cases for each of both files; only the VAE's work is left out."""
    tensors, settings = load_tensors(latents)
    record = json.loads((latents.parent / "run.json").read_text(encoding="utf-8"))
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    monkeypatch.setattr("wan_mini.runs.finish.decode_saved", lambda *_: frames)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    cases = variants(settings if file.startswith("latents") else record)
    own_scripts = (latents.parent / "report.html").read_text(encoding="utf-8").count("<script")
    refused = 0
    for number, changed in enumerate(cases[:: max(1, len(cases) // 150)]):
        place = tmp_path / str(number)
        place.mkdir()
        own = changed if file.startswith("latents") else settings
        save_file(tensors, place / "latents.safetensors", {"settings": json.dumps(own)})
        if file == "run.json":
            (place / "run.json").write_text(json.dumps(changed))
        code = main(["--decode", str(place / "latents.safetensors"), "--out", str(place / "out")])
        said = capsys.readouterr()
        assert code in (0, 2), changed
        if code == 2:
            assert said.err.startswith("error: ") and said.err.count("\n") == 1, (changed, said.err)
            refused += 1
        page = place / "out" / "report.html"
        assert not page.exists() or page.read_text(encoding="utf-8").count("<script") == own_scripts
    assert refused > 20


def test_whatever_a_record_holds_a_run_is_resumed_or_refused(stopped, capsys, monkeypatch):
    """Some 300 cases; the run itself is left out."""
    record = json.loads((stopped / "run.json").read_text(encoding="utf-8"))
    monkeypatch.setattr("wan_mini.runs.program.execute", lambda *_, **__: None)
    cases = variants(record)
    for changed in cases[:: max(1, len(cases) // 300)]:
        (stopped / "run.json").write_text(json.dumps(changed))
        code = main(["--resume", str(stopped)])
        said = capsys.readouterr().err
        assert code == 0 or (code == 2 and said.startswith("error: ") and said.count("\n") == 1), (changed, said)


def test_a_failed_decode_leaves_no_folder_that_refuses_the_next(latents, tmp_path, capsys, monkeypatch):
    command = ["--decode", str(latents), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("wan_mini.runs.finish.write_result", lambda *_, **__: (_ for _ in ()).throw(MemoryError("none")))
        assert main(command) == 2
    one_line(capsys, "out of memory")
    assert not (tmp_path / "out").exists() and main(command) == 0


def test_a_report_has_no_markup_of_others():
    """Whatever a record holds: numbers are written as numbers, names escaped."""
    with pytest.raises(ValueError, match="format code"):
        stage_table({"a": {"seconds": 1.0, "peak_gb": "<script>"}})  # the schema lets no text come here
    assert "<script>" not in stage_table({"<script>": {"seconds": 1.0, "peak_gb": None}})
    assert loss_plot([[], [2.0, 1.0], []]).count("<circle") == 2 and loss_plot([[]]) == ""


# Going on.


@pytest.fixture
def stopped(small, monkeypatch):
    """The folder of a run that was stopped after two of three steps."""
    out = small.out()
    with monkeypatch.context() as patch:
        at_event(patch, 0, None)  # every step is kept
        patch.setattr("wan_mini.runs.program.write_result", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(small.argv(out)) == 130
    for file in out.glob("latents*"):
        file.unlink()
    assert (out / "state.safetensors").exists()
    return out


def rewrite(file, change) -> None:
    """Change the tensors and the metadata of a state."""
    with safe_open(file, framework="pt") as opened:
        metadata = {name: json.loads(text) for name, text in opened.metadata().items()}
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors, metadata)
    save_file(tensors, file, {name: json.dumps(value) for name, value in metadata.items()})


STATES = {
    "step a text": (lambda t, m: m["state"].update(step="x"), "state.step must be a whole number"),
    "step below 0": (lambda t, m: m["state"].update(step=-3), "state.step must be a whole number"),
    "step between": (lambda t, m: m["state"].update(step=0.5), "state.step must be a whole number"),
    "history a list": (lambda t, m: m["state"].update(history=[]), "state.history must be an object"),
    "history of another": (lambda t, m: m["state"]["history"].update(evil=1), "a history evil that is not"),
    "history no list": (
        lambda t, m: m["state"]["history"].update(losses=5),
        "a history losses that is not",
    ),
    "hashes a list": (lambda t, m: m["state"].update(checkpoint_sha256=[]), "checkpoint_sha256 must be an object"),
    "no state": (lambda t, m: m.pop("state"), "is no run's state"),
    "settings a list": (lambda t, m: m.update(settings=[]), "settings should hold a JSON object"),
    "nested": (lambda t, m: m["settings"].update(x=json.loads("[" * 900 + "]" * 900)), "nested deeper than 32"),
    "other latents": (lambda t, m: t.update(latents=torch.zeros(1, 16, 2, 4, 6)), "not of this run"),
    "other reference": (lambda t, m: t.update(reference=torch.zeros(1, 16, 1, 4, 4)), "got (1, 16, 1, 4, 4)"),
    "a name of Python's": (lambda t, m: t.update(__class__=torch.zeros(1)), "holds __class__ (1,), not of this run"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_changed_state_is_one_line(stopped, capsys, case):
    change, message = STATES[case]
    rewrite(stopped / "state.safetensors", change)
    before = sorted(file.name for file in stopped.iterdir())
    capsys.readouterr()
    assert main(["--resume", str(stopped)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and message in said[0]
    assert sorted(file.name for file in stopped.iterdir()) == before


def test_a_pipe_is_no_state(stopped, capsys):
    (stopped / "state.safetensors").unlink()
    os.mkfifo(stopped / "state.safetensors")
    assert main(["--resume", str(stopped)]) == 2
    assert "state.safetensors is no regular file" in capsys.readouterr().err


RECORDS = {
    "seed too large": ({"seed": 2**70}, "run.json: seed must be a whole number"),
    "recompute": ({"recompute": "foo"}, "run.json: recompute must be one of none, selective, block"),
    "offload": ({"offload": "foo"}, "run.json: offload must be one of none, parts, blocks"),
    "label too long": ({"label": "w" * 100}, "--label needs a text that fits into 32x32 pixels"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_changed_record_is_one_line_and_leaves_the_run_alone(stopped, capsys, monkeypatch, case):
    change, message = RECORDS[case]
    for file in stopped.glob("state*"):
        file.unlink()  # as after a kill before the first save
    record = json.loads((stopped / "run.json").read_text(encoding="utf-8"))
    (stopped / "run.json").write_text(json.dumps(record | change))
    monkeypatch.setattr("wan_mini.runs.program.load_wan", lambda *_, **__: pytest.fail("weights were loaded"))
    assert main(["--resume", str(stopped)]) == 2
    one_line(capsys, message)
    assert (stopped / "run.json").exists()


def test_a_failed_resume_leaves_the_run_alone(stopped, capsys):
    """A run without a state yet begins again; a wrong --ref must not remove it."""
    for file in stopped.glob("state*"):
        file.unlink()
    assert main(["--resume", str(stopped), "--ref", "/nope.mp4"]) == 2
    one_line(capsys, "no clip at /nope.mp4")
    assert (stopped / "run.json").exists() and main(["--resume", str(stopped)]) == 0


# Names, jobs, labels.


def test_a_name_too_long_to_be_written_is_refused_at_once(folder, tmp_path, capsys, monkeypatch):
    """File systems take 255 bytes; a state that is being written has a longer name than its video."""
    command = ["--model", str(folder), "--prompt", "a cat", "--device", "cpu", "--height", "32", "--width", "32"]
    command += ["--frames", "5", "--steps", "1", "--out"]
    assert run(generate.program, [*command, str(tmp_path / f"{'n' * 195}.webp")]) == 0
    capsys.readouterr()
    monkeypatch.setattr(generate, "load_wan", lambda *_, **__: pytest.fail("weights were loaded"))
    assert run(generate.program, [*command, str(tmp_path / "x" / f"{'n' * 196}.webp")]) == 2
    one_line(capsys, "--out needs a name of at most 200 bytes, got one of 201")
    assert not (tmp_path / "x").exists()


def test_a_name_that_is_held_is_not_taken_away(tmp_path):
    out = tmp_path / "a.webp"
    with reserved(out, ".html"):
        with pytest.raises(UserError, match="is of a run that is still going"), reserved(out, ".html", resumed=True):
            pass
        assert out.with_suffix(".html").exists() and lock_file(out).exists()
    assert list(tmp_path.iterdir()) == []


def test_jobs_are_bounded_text(tmp_path, monkeypatch):
    file = tmp_path / "jobs.jsonl"
    file.write_bytes(b'{"out": "\xff"}')
    with pytest.raises(UserError, match=r"jobs.jsonl must be text in UTF-8, got invalid start byte at byte 9: save"):
        read_lines(file)
    file.write_text('{"out": "a", "prompt": "one\u2028line"}\n{"out": "b"}', encoding="utf-8")
    assert len(read_lines(file)) == 2
    monkeypatch.setattr("wan_mini.runs.jobs.MAX_BYTES", 10)
    with pytest.raises(UserError, match="more than 10: split it"):
        read_lines(file)
    for value in ("null", '{"a": 1}'):
        with pytest.raises(UserError, match=r"out must be what --out takes, got"):
            parse_job(f'{{"out": {value}}}', None, [])


def test_a_label_is_one_line_of_characters_that_the_font_has():
    one = label_box("AI made", 96, 192)
    assert label_box("AI\nmade", 96, 192).tobytes() == one.tobytes() == label_box("  AI  made ", 96, 192).tobytes()
    with pytest.raises(
        UserError, match=re.escape("--label has characters that its font lacks, got '标签': use others")
    ):
        label_box("标签", 96, 192)
    frames = torch.zeros(2, 32, 48, 3, dtype=torch.uint8).numpy()
    assert with_label(frames, " ") is frames


def test_marks_without_rows_are_refused(tmp_path, capsys):
    assert run(marks.program, ["--show", "--csv", str(tmp_path / "none.csv")]) == 2
    one_line(capsys, "has no rows of this table")
