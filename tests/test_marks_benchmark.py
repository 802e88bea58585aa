"""The benchmark of marks: its distortions, its rows, and that it goes on where it stopped."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import marks
from benchmarks.metrics.distortions import distortions
from benchmarks.metrics.svg import BLUE, GRAY
from fastvmt import MotionConfig
from wan_mini.errors import UserError
from wan_mini.verify import AS_IT_IS, VIEWS, Match, View

ROOT = Path(__file__).resolve().parent.parent
FRAMES = np.random.default_rng(0).integers(0, 256, (17, 40, 60, 3), dtype=np.uint8)
SMOOTH = np.broadcast_to(np.linspace(20, 200, 60, dtype=np.uint8)[:, None], (17, 40, 60, 3)).copy()


def test_distortions_do_what_they_are_called():
    table = distortions()
    assert table["none"](FRAMES) is FRAMES
    assert np.array_equal(table["first_frame_lost"](FRAMES), FRAMES[1:])
    assert np.array_equal(table["trimmed"](FRAMES), FRAMES[2:15])
    assert np.array_equal(table["mirrored"](FRAMES)[:, :, 0], FRAMES[:, :, -1])
    assert table["brighter"](np.array([[[[100, 250, 0]]]], np.uint8)).tolist() == [[[[110, 255, 0]]]]
    for name in ("half_size", "webp"):
        got = table[name](SMOOTH)
        assert got.shape == SMOOTH.shape and 0 < np.abs(got.astype(int) - SMOOTH).mean() < 4
        assert np.abs(table[name](FRAMES).astype(int) - FRAMES).mean() > 10
    inner = table["cropped"](SMOOTH)  # 3 of 60 columns are cut on each side
    assert inner.shape == SMOOTH.shape and inner[0, 20, 0, 0] > SMOOTH[0, 20, 2, 0]
    assert inner[0, 20, -1, 0] < SMOOTH[0, 20, -3, 0]


class Fake:
    """Transfers that count."""

    wan = device = None

    def __init__(self):
        self.made = []

    def generate(self, number, kind, marked):
        self.made.append((number, marked))
        return FRAMES + np.uint8(marked)

    def second_generation(self, frames, number, kind):
        return frames


class FakeVerifier:
    """z is 9 for marked frames; the views are those of the distortion."""

    views: dict = {}

    def __init__(self, wan, frames, original, device):
        assert original == (17, 40, 60)
        self.frames = frames

    def best(self, seeds, key, views):
        assert key == marks.KEY
        self.views[len(self.frames)] = list(views)
        (seed,) = seeds
        return Match(seed, View(0, False), 0, 0.5, 9.0), -20.0


def test_a_second_call_does_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(marks, "Verifier", FakeVerifier)
    path, clips, fake = tmp_path / "marks.csv", [(5, "single"), (6, "several")], Fake()
    names = dict.fromkeys((True, False), ["none", "first_frame_lost", "second_generation"])
    marks.measure_all(fake, clips[:1], names, path, "a")
    assert fake.made == [(5, True), (5, False)]
    assert FakeVerifier.views == {17: [AS_IT_IS], 16: list(VIEWS)}
    before = path.read_text()
    marks.measure_all(fake, clips[:1], names, path, "a")
    assert path.read_text() == before and len(fake.made) == 2
    lines = before.splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:9])  # killed while it wrote its last row
    marks.measure_all(fake, clips, names, path, "a")
    assert fake.made[2:] == [(5, False), (6, True), (6, False)]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"a"}
    with pytest.raises(UserError, match="has rows of another model or other settings: choose another --csv"):
        marks.measure_all(fake, clips, names, path, "b")
    keys = [(row["clip"], row["marked"], row["distortion"]) for row in rows]
    assert len(keys) == len(set(keys)) == 12 and list(rows[0]) == list(marks.COLUMNS)


def test_the_summary_counts_what_is_found():
    rows = []
    for number in range(4):
        for marked in (0, 1):
            rate = "-7.0" if marked and number else "-1.0"
            rows.append(
                {"clip": str(number), "marked": str(marked), "distortion": "none", "z": str(number), "log10_rate": rate}
            )
    line = marks.summary(rows).splitlines()[1].split()
    assert line == ["none", "3", "of", "4", "0.0", "to", "3.0", "0", "of", "4", "0.0", "to", "3.0"]


def test_the_figure_has_a_tick_for_each_clip(tmp_path, capsys):
    rows = []
    for marked, z in (("1", "50.00"), ("1", "70.00"), ("0", "1.00")):
        row = dict.fromkeys(marks.COLUMNS, "0") | {"distortion": "first_frame_lost", "marked": marked, "z": z}
        rows.append(row)
    marks.rewrite(tmp_path / "a.csv", rows)
    marks.program(["--csv", str(tmp_path / "a.csv"), "--show"])
    drawn = (tmp_path / "a.svg").read_text()
    at = [180 + z / 70 * 780 for z in (50, 70, 1)]
    for x, color in zip(at, (BLUE, BLUE, GRAY)):
        assert len(re.findall(f'<line x1="{x:.1f}"[^>]*stroke="{color}"', drawn)) == 1
    assert drawn.count(f'stroke="{BLUE}"') == 2 and "first frame lost" in drawn
    assert f'<line x1="{180 + 4.7534 / 70 * 780:.1f}"' in drawn  # z of a normal tail of 1e-6
    assert "first_frame_lost" in capsys.readouterr().out


def test_the_readmes_table_is_of_the_rows_that_ship():
    """How many were found, and the range of z, in the table's order; every row is of one run and of 50 clips."""
    page = (ROOT / "wan_mini/README.md").read_text(encoding="utf-8")
    printed = re.findall(r"\| (\d+ of \d+), \[(-?\d+), (\d+)\] \|", page)
    rows = marks.read_rows(marks.RESULTS)
    assert len({row["run"] for row in rows}) == 1
    expected = []
    for marked in ("1", "0"):
        for name in dict.fromkeys(row["distortion"] for row in rows if row["marked"] == marked):
            group = [row for row in rows if (row["distortion"], row["marked"]) == (name, marked)]
            assert len({row["clip"] for row in group}) == len(group) == 50
            hits = sum(float(row["log10_rate"]) <= -6 for row in group)
            scores = [float(row["z"]) for row in group]
            expected.append((f"{hits} of 50", f"{abs(min(scores)):.0f}", f"{max(scores):.0f}"))
    assert printed == expected and len(printed) == 15
    names = dict.fromkeys(row["distortion"] for row in rows)
    found = {name: int(hits.split()[0]) for name, (hits, _, _) in zip(names, printed)}
    assert found["none"] == 50 and found["h264_crf23"] >= 48  # what is promised
    assert found["second_generation"] == 0 and [hits for hits, _, _ in printed[13:]] == ["0 of 50"] * 2
    assert marks.RESULTS.with_suffix(".svg").read_text(encoding="utf-8") == marks.figure(rows)


def test_unmarked_clips_may_have_fewer_distortions(tmp_path, monkeypatch):
    monkeypatch.setattr(marks, "Verifier", FakeVerifier)
    marks.measure_all(Fake(), [(5, "single")], {True: ["none", "mirrored"], False: ["none"]}, tmp_path / "a.csv", "a")
    rows = marks.read_rows(tmp_path / "a.csv")
    assert [(row["marked"], row["distortion"]) for row in rows] == [("1", "none"), ("1", "mirrored"), ("0", "none")]


def test_a_run_is_its_weights_and_its_settings():
    wan, config = SimpleNamespace(hashes={"dit": "1"}, dtype=torch.float32), MotionConfig()
    first = marks.run_of(wan, config)
    assert first == marks.run_of(wan, MotionConfig())
    other = SimpleNamespace(hashes={"dit": "2"}, dtype=torch.float32)
    assert len({first, marks.run_of(other, config), marks.run_of(wan, MotionConfig(steps=3))}) == 3


def test_unknown_distortions_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="--only needs some of none, .*, got blur"):
        marks.program(["--csv", str(tmp_path / "x.csv"), "--only", "blur"])
