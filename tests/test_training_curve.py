"""The figure of the tiny model's learning curve."""

import json

import pytest

from wan_mini.tiny.training.recipe import DIT

pytest.importorskip("matplotlib", reason="of the notebooks extra")


def test_a_named_curve_is_kept_and_drawn(tmp_path, monkeypatch):
    from benchmarks import training_curve

    entries = []
    for step, shape in ((100, 0.25), (200, 0.75)):
        shown = {name: {"shape_ok": shape / (1 + number)} for number, name in enumerate(training_curve.DRAWN)}
        entries.append({"step": step, **shown, "matching": {"0.5": [0.1, 0.2, shape]}})
    work = tmp_path / "work.jsonl"
    work.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    monkeypatch.setattr(training_curve, "CURVE", tmp_path / "curve.jsonl")
    training_curve.main([str(work)])
    assert (tmp_path / "curve.jsonl").read_text() == work.read_text()
    first = (tmp_path / "curve.svg").read_text()
    for label in ("one object, unseen pair", "block 2", "training step"):
        assert f"<!-- {label} -->" in first
    assert "block 3" not in first
    training_curve.main([])
    assert (tmp_path / "curve.svg").read_text() == first
    for entry in entries:
        entry["single"], entry["several"] = entry["several"], entry["single"]
    work.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    training_curve.main([str(work)])
    assert (tmp_path / "curve.svg").read_text() != first  # each kind has a line of its own


def test_phases_are_marked_where_they_begin(monkeypatch):
    from benchmarks import training_curve

    marked = []

    class Axes:
        def axvline(self, step, **style):
            marked.append(step)

    training_curve.mark_phases(Axes(), DIT)
    assert marked[0] == DIT.phases[0].steps
    assert marked[-1] == DIT.steps - DIT.phases[-1].steps
