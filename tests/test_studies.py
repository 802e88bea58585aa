"""The studies: their clips by hand, their points, one clip of each with a stub, and (slow) with a random model."""

import itertools
import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_frontier import copies

from benchmarks.evaluate import clip_seeds
from benchmarks.metrics.energy import EnergyMeter
from benchmarks.metrics.forest import Effect, forest
from benchmarks.metrics.points import (
    MEASURES,
    first_frames,
    reduced,
    settings_of_point,
)
from benchmarks.metrics.rows import difference_text, paired, read_rows, values_of
from benchmarks.metrics.svg import BLUE
from benchmarks.metrics.svg import GRAY as LIGHT
from benchmarks.studies import blocks, cuts, energy, interval, length, schedule, speed
from benchmarks.studies.blocks import BlocksConfig, SeveralBlocks
from benchmarks.studies.clips import CUT, GRAY, OCCLUDER, frames_at, occluded, played, with_cut
from benchmarks.studies.program import RESULTS
from wan_mini.load import load_wan
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.world import make_clip

ROOT = Path(__file__).resolve().parent.parent
STUDIES = [blocks, cuts, energy, interval, length, schedule, speed]


def test_speeds_by_hand():
    assert frames_at(1.0) == list(range(33)) and frames_at(0.5, 6) == [0, 0, 1, 1, 2, 2]
    assert frames_at(3.0)[:13] == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 31, 28]
    assert frames_at(2.0)[16:19] == [32, 30, 28] and frames_at(1.0, 81)[31:35] == [31, 32, 31, 30]
    fast = played(frames_at(2.0))(1, "single", "train")
    usual = make_clip(1, "single")
    assert np.array_equal(fast.frames[:17], usual.frames[::2]) and np.array_equal(
        fast.tracks[:, :17], usual.tracks[:, ::2]
    )
    assert np.array_equal(fast.frames[32], usual.frames[0])


def test_cuts_and_occluders_leave_the_truth_alone():
    clip, cut, hidden = (make(3, "single", "train") for make in (make_clip, with_cut, occluded))
    assert np.array_equal(cut.frames[:CUT], clip.frames[:CUT]) and not np.array_equal(
        cut.frames[CUT:], clip.frames[CUT:]
    )
    changed = (hidden.frames != clip.frames).any((0, 1, 3))
    assert changed[OCCLUDER].all() and changed.sum() == 40 and (hidden.frames[:, :, OCCLUDER] == GRAY).all()
    for other in (cut, hidden):
        assert np.array_equal(other.tracks, clip.tracks) and other.caption == clip.caption
    part = first_frames(clip, CUT)
    assert len(part.frames) == part.tracks.shape[1] == part.visible.shape[1] == CUT
    assert first_frames(clip, None).frames is not None and len(first_frames(clip, None).frames) == 33


def test_twice_the_grid_comes_back():
    frames = make_clip(1, frames=[0, 5]).frames
    large = frames.repeat(2, axis=1).repeat(2, axis=2)
    assert np.array_equal(reduced(large, 2), frames) and reduced(frames, 1) is frames
    large[0, 0, 0] += 4  # one pixel of four
    assert (reduced(large, 2)[0, 0, 0] - frames[0, 0, 0]).tolist() == [1, 1, 1]


def test_the_meter_counts_on_when_its_counter_wraps(tmp_path):
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("10000000\n")
    (package / "energy_uj").write_text("9000000\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the package, not counted twice
    meter = EnergyMeter(tmp_path)
    (package / "energy_uj").write_text("9500000\n")
    assert meter.joules() == pytest.approx(0.5)
    (package / "energy_uj").write_text("2000000\n")
    assert meter.joules() == pytest.approx(3.0)
    assert np.isnan(EnergyMeter(tmp_path / "none").joules())


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.__name__.split(".")[-1])
def test_a_study_says_what_it_expects_and_runs(study, tmp_path, monkeypatch, capsys):
    """Its first and last point on one clip, with a transfer that copies the reference."""
    words = study.__doc__.split()
    assert len(words) <= 150 and "Hypothesis, written before any run." in " ".join(words) and "Limit:" in words
    points = study.points()
    settings = [settings_of_point(point, {}) for point in points.values()]
    assert len(points) >= 3 and len(set(settings)) >= 0.7 * len(points)  # the preset may be one of its variations
    calls = []
    copied = {name: replace(point, transfer=copies(calls)) for name, point in points.items()}
    monkeypatch.setattr(study, "points", lambda: copied)
    names = [list(points)[0], list(points)[-1]]
    file = tmp_path / "rows.csv"
    flags = ["--clips", "1", "--device", "cpu", "--csv", str(file), "--points", *names]
    study.program(flags)
    study.program(flags)  # goes on: nothing is left to do
    assert len(calls) == 2 and calls[0][0] == clip_seeds(0, 1)[0][0]
    rows = read_rows(file, MEASURES)
    assert [row["method"] for row in rows] == names and all(row["correlation"] > 0.5 for row in rows)
    assert f"| {names[1]} | 1 |" in capsys.readouterr().out
    drawing = file.with_suffix(".svg").read_text(encoding="utf-8")
    ET.fromstring(drawing)
    assert f">{names[0]}</text>" in drawing and drawing.count("<circle") >= 1


def test_every_point_has_a_base_that_is_its_own():
    """Bases are points of the same study, and are compared with themselves: hollow in the figure."""
    for study in STUDIES:
        points = study.points()
        for point in points.values():
            assert point.base == "" or points[point.base].base == point.base
    assert speed.points()["speed 3, span 2"].base == "speed 3, preset"
    assert cuts.points()["occluded"].base == "seen"


def test_a_forest_plot_shows_each_interval():
    """By hand: x runs from -0.24 to 0.54 over 420 pixels; an interval that includes 0 is gray."""
    effects = [
        Effect("base", "base", (0.0, 0.0, 0.0), ("0.5",)),
        Effect("better", "base", (0.3, 0.1, 0.5), ("0.8",)),
        Effect("<no>", "other", (0.0, -0.1, 0.1), ("0.5",)),
        Effect("not run", "other", None, ("-",)),
    ]
    drawing = forest(effects, title="A & B", x_title="x", columns=("mean",))
    root = ET.fromstring(drawing)
    circles = root.findall("{*}circle")
    assert [circle.get("fill") for circle in circles] == ["#ffffff", BLUE, LIGHT]
    assert float(circles[1].get("cx")) == pytest.approx(300 + 0.54 / 0.78 * 420, abs=0.1)
    assert [float(circle.get("cy")) for circle in circles] == [96, 122, 148]
    bars = [line for line in root.findall("{*}line") if line.get("stroke") == BLUE]
    assert float(bars[0].get("x1")) == pytest.approx(300 + 0.34 / 0.78 * 420, abs=0.1)
    assert float(bars[0].get("x2")) == pytest.approx(300 + 0.74 / 0.78 * 420, abs=0.1)
    texts = [text.text for text in root.findall("{*}text")]
    assert {"A & B", "<no>", "not run", "mean", "+0.2", "0", "-0.2", "+0.4"} <= set(texts)
    dividers = [line for line in root.findall("{*}line") if line.get("stroke") == "#dddddd"]
    assert len(dividers) == 1


def test_the_studies_that_ship(tmp_path):
    """By today's options and weights, all points on the same clips; figures and intervals are those of the rows."""
    page = (ROOT / "benchmarks" / "studies" / "README.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", page.partition("\n---\n")[0], flags=re.MULTILINE)[1:]
    hashes = load_wan(CHECKPOINT, device="cpu", dtype=torch.float32).hashes
    for study, section in zip([speed, cuts, blocks, interval, schedule, length, energy], sections, strict=True):
        words = section.partition("\n")[2].split()
        assert len(words) <= 150
        assert all(f"**{part}.**" in words for part in ("Hypothesis", "Answer", "Limit"))
        name = study.__name__.split(".")[-1]
        file = RESULTS / f"{name}.csv"
        assert file.exists() == (study is not energy)  # joules could not be read
        if not file.exists():
            continue
        rows = read_rows(file, MEASURES)
        points = study.points()
        assert all(row["settings"] == settings_of_point(points[row["method"]], hashes) for row in rows)
        clips = {point: sorted(values_of(rows, point, "seconds")) for point in points}
        assert len(set(map(tuple, clips.values()))) == 1 and len(clips[next(iter(points))]) >= 4
        differences = set()
        for first, second in itertools.permutations(points, 2):
            differences.add(difference_text(paired(rows, first, second, "correlation")))
        stated = re.findall(r"[+-]\d\.\d\d \[[^\]]*\]", section.replace("\n", " "))
        assert len(stated) >= 1 and set(stated) <= differences
        copy = Path(shutil.copy(file, tmp_path))
        study.program(["--show", "--csv", str(copy)])
        assert copy.with_suffix(".svg").read_bytes() == file.with_suffix(".svg").read_bytes()
        assert f"results/studies/{name}.svg" in section


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.__name__.split(".")[-1])
def test_a_study_with_a_model(study, folder, tmp_path, monkeypatch):
    """The same with the small random model, in two steps."""
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    shutil.copyfile(CHECKPOINT / "motion.json", copy / "motion.json")
    few = {"steps": 2, "guidance_fraction": 0.5, "optim_steps": 2, "cfg": 1.0}
    points = {}
    for name, point in study.points().items():
        config = type(point.config)(**{**vars(point.config), **few})
        points[name] = replace(point, config=config)
    monkeypatch.setattr(study, "points", lambda: points)
    names = [list(points)[0], list(points)[-1]]
    file = tmp_path / "rows.csv"
    study.program(["--model", str(copy), "--clips", "1", "--device", "cpu", "--csv", str(file), "--points", *names])
    rows = read_rows(file, MEASURES)
    assert [row["method"] for row in rows] == names and all(row["denoising_gflop"] > 0 for row in rows)
    assert json.loads((copy / "motion.json").read_text())


def test_several_blocks_have_the_mean_of_their_losses(wan):
    """Blocks 0 and 1 at equal latents and noise, in two steps that see other frames; operations add up."""
    reference, noise = torch.randn(2, 1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 3, wan.dit.config.text_dim)
    common = {"steps": 2, "guidance_fraction": 1.0, "optim_steps": 1, "window": 3, "tile": (2, 2), "frames_every": 2}
    losses, operations = [], []
    both = BlocksConfig(**common, block=1, beside=(0,))
    for config in (BlocksConfig(**common, block=0), BlocksConfig(**common, block=1), both):
        guidance = SeveralBlocks(wan.dit, reference, noise, text, text, config)
        for step in range(2):
            guidance.before_step(step, noise, torch.tensor(0.9), torch.tensor(900.0))
        losses.append(np.array(guidance.losses)[:, 0])  # (steps,)
        operations.append(guidance.spent()["flops"]["guidance"])
    assert (losses[0] != losses[1]).all() and losses[2] == pytest.approx((losses[0] + losses[1]) / 2)
    assert operations[2] == operations[0] + operations[1]
