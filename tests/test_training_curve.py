"""The figure of the tiny model's learning curve."""

import json

import pytest

from wan_mini.tiny.training.recipe import DIT

pytest.importorskip("matplotlib", reason="of the notebooks extra")


def curve_of(names, shape, file):
    """Write a curve of two entries, and return its text."""
    entries = []
    for step, right in ((100, shape / 2), (200, shape)):
        shown = {name: {"shape_ok": right / (1 + number)} for number, name in enumerate(names)}
        entries.append({"step": step, **shown, "matching": {"0.5": [0.1, 0.2, right]}})
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file.read_text()


def test_named_curves_are_kept_and_drawn(tmp_path, monkeypatch):
    from benchmarks import training_curve

    monkeypatch.setattr(training_curve, "CURVE", tmp_path / "curve.jsonl")
    kept, picture = tmp_path / training_curve.UNMATCHED, tmp_path / "curve.svg"
    work, other = tmp_path / "work.jsonl", tmp_path / "other.jsonl"
    text = curve_of(training_curve.DRAWN, 0.75, work)
    other_text = curve_of(training_curve.DRAWN, 0.5, other)
    training_curve.main([str(work), "--without-matching", str(other)])
    assert (tmp_path / "curve.jsonl").read_text() == text and kept.read_text() == other_text
    first = picture.read_text()
    for label in ("one object, unseen pair", "block 2", "training step"):
        assert f"<!-- {label} -->" in first
    assert "<!-- block 3 -->" not in first  # of blocks, only those that the curves have
    training_curve.main([])
    assert picture.read_text() == first
    reordered = [*training_curve.DRAWN][1:] + [*training_curve.DRAWN][:1]
    curve_of(reordered, 0.75, work)
    training_curve.main([str(work), "--without-matching", str(other)])
    assert picture.read_text() != first  # each kind has a line of its own


def test_each_side_has_its_own_training(tmp_path, monkeypatch):
    from benchmarks import training_curve

    drawn = []

    def draw(axes, entries):
        drawn.append((axes.get_title(), entries))
        axes.plot([0, 1], [0, 1], label="a line")

    for name in ("draw_shapes", "draw_matching"):
        monkeypatch.setattr(training_curve, name, draw)
    training_curve.draw_curves(["matched"], ["unmatched"], DIT, tmp_path / "curve.svg")
    shapes, matching = drawn[::2], drawn[1::2]
    assert shapes == [("with a matching loss on block 3", ["matched"]), ("without it", ["unmatched"])]
    assert [entries for _, entries in matching] == [["matched"], ["unmatched"]]


def test_phases_are_marked_where_they_begin(monkeypatch):
    from benchmarks import training_curve

    marked = []

    class Axes:
        def axvline(self, step, **style):
            marked.append(step)

    training_curve.mark_phases(Axes(), DIT)
    assert marked[0] == DIT.phases[0].steps
    assert marked[-1] == DIT.steps - DIT.phases[-1].steps
