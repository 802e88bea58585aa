"""The table of methods: its registry, its CSV that goes on after a stop, and what it says of ranks."""

import csv
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from benchmarks import table1, tuning
from benchmarks.evaluate import clip_seeds
from benchmarks.metrics import fidelity
from benchmarks.metrics.rows import COLUMNS, MEASURES, append_rows, check_settings, ranks, read_rows, table
from wan_mini.device.memory import module_bytes
from wan_mini.errors import UserError
from wan_mini.load import load_wan
from wan_mini.peers import adapted
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.world import make_clip

CHANCE = [
    "the reference itself",
    "chance: another clip",
    "chance: the reference's first frame",
    "chance: tracks of another clip",
    "chance: jitter",
]


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory) -> Path:
    """The random model with options for two short steps."""
    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("table") / "model"))
    motion = {"steps": 2, "shift": 3.0, "cfg": 1.0, "negative": "", "guidance_fraction": 0.5, "optim_steps": 1}
    clip = {"height": 128, "width": 192, "frames": 33, "fps": 16}
    (copy / "motion.json").write_text(json.dumps({"clip": clip, "motion": motion}))
    return copy


def test_every_method_has_options_of_its_own(model):
    methods = table1.entries(CHECKPOINT)
    assert list(methods)[:3] == ["none", "dense flow", "fastvmt"]
    for peer in ("ditflow", "smm", "moft", "motionclone", "flowmotion"):
        assert {f"{peer}, equal", f"{peer}, own"} < set(methods)
    settings = {table1.settings_of(entry.config, {"a": "1"}) for entry in methods.values()}
    assert len(settings) == len(methods)
    entry = methods["fastvmt"]
    assert table1.settings_of(entry.config, {"a": "2"}) not in settings  # other weights
    for name, entry in methods.items():
        if name.endswith("equal"):
            ours = methods["fastvmt"].config
            assert entry.config.guided_steps == ours.guided_steps and entry.config.rates(0)[-1] == ours.lr[1]
            assert len(entry.config.rates(0)) == ours.optim_steps
    heads = {methods[f"follow-your-motion, {kind} heads"].config.heads for kind in ("all", "random", "swapped")}
    assert heads == {"all", "random", "swapped"} and methods["follow-your-motion"].config.heads not in heads
    assert {"motiondirector", "motioninversion", "det"} < set(methods)


def test_adapters_are_trained_with_the_references_caption(monkeypatch):
    calls = []
    monkeypatch.setattr(adapted, "transfer", lambda *args, **options: calls.append((args, options)))
    entry = table1.entries(CHECKPOINT)["motiondirector"]
    clip = make_clip(1, "single", frames=[0])
    entry.run("model", clip, "a prompt", 7)
    (args, options) = calls[0]
    assert args[0] == "model" and args[1] is clip.frames and args[2:] == ("a prompt", entry.config)
    assert options == {"ref_prompt": clip.caption, "seed": 7}


def short_clip(seed, kind=None, split="train"):
    return make_clip(seed, kind, split, range(0, 33, 8))  # five frames


def test_a_run_that_goes_on(model, tmp_path, capsys, monkeypatch):
    """One clip, two methods; then a third one, for which nothing is run again."""
    monkeypatch.setattr(table1, "make_clip", short_clip)
    monkeypatch.setattr(fidelity, "make_clip", short_clip)
    file = tmp_path / "rows.csv"
    flags = ["--model", str(model), "--clips", "1", "--device", "cpu", "--csv", str(file)]
    table1.program([*flags, "--methods", "none", "moft, equal"])
    first, text = read_rows(file), file.read_text()
    number, kind = clip_seeds(0, 1)[0]
    assert [row["method"] for row in first] == [*CHANCE, "none", "moft, equal"]
    assert {(row["clip"], row["kind"]) for row in first} == {(str(number), kind)}
    assert [row["gradients"] for row in first[-2:]] == [0, 1]
    assert first[-1]["peak_gb"] > first[-2]["peak_gb"] > 0 and first[-1]["seconds"] > 0
    assert all(0 <= first[-1][name] <= 1 for name in ("subject", "temporal", "smoothness", "color_ok", "leak"))
    table1.program([*flags, "--methods", "flowmotion, own", "none"])
    rows = read_rows(file)
    assert [row["method"] for row in rows] == [*CHANCE, "none", "moft, equal", "flowmotion, own"]
    assert text.startswith(",".join(COLUMNS)) and file.read_text().startswith(text)
    assert json.loads(file.with_suffix(".json").read_text())["moft, equal"]["channels"] == 0.25
    printed = capsys.readouterr().out
    assert "| fastvmt | 0 | - | -" in printed and "| moft, equal | 1 | " in printed
    table1.program([*flags, "--show"])
    assert capsys.readouterr().out.count("| chance: jitter | 1 |") == 1
    assert len(read_rows(file)) == len(rows)
    file.write_text("".join(text.splitlines(keepends=True)[:3]))  # stopped after two of the chance rows
    table1.program([*flags, "--methods", "none"])
    assert [row["method"] for row in read_rows(file)] == [*CHANCE, "none"]


def test_two_processes_share_the_clips(model, tmp_path, monkeypatch):
    """Of stubs: every row once below one heading; one that fails is named, and both processes end with 1."""
    clips = [number for number, _ in clip_seeds(0, 4)]

    def stub(wan, methods, clips_of_job, split, done):
        ((number, kind),) = clips_of_job
        time.sleep(0.2)
        if number == clips[2]:
            raise RuntimeError("out of luck")
        yield {**row_of("none", str(number), 0.5, 1.0), "kind": kind}

    monkeypatch.setattr(table1, "rows_of", stub)
    file = tmp_path / "rows.csv"
    flags = ["--model", str(model), "--clips", "4", "--device", "cpu", "--csv", str(file), "--methods", "none"]
    codes, printed = run_ranks(2, flags, tmp_path / "log", table1.program)
    assert codes == [1, 1], printed
    assert sorted(row["clip"] for row in read_rows(file)) == sorted(map(str, [*clips[:2], clips[3]]))
    assert sum(text.count(f"error: clip {clips[2]}: out of luck") for text in printed) == 1
    assert "| none | 3 |" in printed[0] and "| none |" not in printed[1]
    assert json.loads(file.with_suffix(".json").read_text()).keys() >= {"none", "fastvmt"}


def test_rows_of_other_options_are_not_mixed(model, tmp_path):
    file = tmp_path / "rows.csv"
    row = dict.fromkeys(COLUMNS, "1") | {"method": "none", "settings": "other"}
    append_rows(iter([row]), file)
    with pytest.raises(UserError, match="rows of none with other options or weights"):
        table1.program(["--model", str(model), "--clips", "1", "--device", "cpu", "--csv", str(file)])
    file.write_text("a,b\n")
    with pytest.raises(UserError, match="other columns"):
        read_rows(file)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "nine"], "--methods nine: choose from none; dense flow; fastvmt"),
        (["--clips", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        table1.program(flags)


def test_chance_rows(monkeypatch):
    """The reference moves rightly but shows the wrong scene; what does not move has no correlation."""
    monkeypatch.setattr(fidelity, "make_clip", short_clip)
    clip = short_clip(2, "single")
    rows = dict(table1.chance_rows(clip, 2))
    assert list(rows) == CHANCE
    own, frozen = rows[CHANCE[0]], rows[CHANCE[2]]
    assert own["correlation"] > 0.8 and own["leak"] and not own["color_ok"]
    assert abs(frozen["correlation"]) < 0.2 and frozen["smoothness"] == 1 and frozen["subject"] == 1
    assert np.isnan(frozen["published"]) and frozen["dynamic"] < 0.05
    assert rows[CHANCE[1]]["correlation"] < own["correlation"]


def test_memory_is_that_of_the_larger_pass(model):
    wan = load_wan(model, device="cpu", dtype=torch.float32, hash_files=False)
    methods = table1.entries(model)
    frames = np.zeros((9, 64, 96, 3), dtype=np.uint8)
    peaks = {name: table1.counted_peak(wan.dit, frames, methods[name]) for name in ("none", "fastvmt", "smm, own")}
    assert peaks["fastvmt"] > peaks["none"] > module_bytes(wan.dit) / 1e9
    assert peaks["smm, own"] > peaks["none"]


def row_of(method: str, clip: str, correlation: float, seconds: float) -> dict:
    return dict.fromkeys(MEASURES, 0.0) | {
        "clip": clip,
        "method": method,
        "settings": "x",
        "correlation": correlation,
        "seconds": seconds,
    }


def test_the_rows_that_ship_are_of_todays_options_and_weights():
    """Else a run that goes on would refuse them, and the page tell of other methods."""
    wan = load_wan(CHECKPOINT, device="cpu", dtype=torch.float32)
    entries = table1.entries(CHECKPOINT)
    settings = {name: table1.settings_of(entry.config, wan.hashes) for name, entry in entries.items()}
    check_settings(read_rows(table1.RESULTS), settings, table1.RESULTS)
    assert json.loads(table1.RESULTS.with_suffix(".json").read_text()) == json.loads(
        json.dumps({name: asdict(entry.config) for name, entry in entries.items()})
    )
    tried = {}
    for name, candidate in tuning.CANDIDATES.items():
        for strength in candidate.strengths:
            config = tuning.options_of(candidate, CHECKPOINT, strength)
            tried[tuning.row_name(name, strength)] = table1.settings_of(config, wan.hashes)
    rows = read_rows(tuning.RESULTS, tuning.MEASURES)
    check_settings(rows, tried, tuning.RESULTS)
    assert {row["method"] for row in rows} == set(tried)


def test_ranks_are_over_the_clips_that_all_have():
    rows = [row_of("fastvmt", "1", 0.5, 10), row_of("moft", "1", 0.9, 8), row_of("none", "1", 0.1, 5)]
    rows += [row_of("fastvmt", "2", 2.0, 1)]
    assert ranks(rows) == [
        "fastvmt is number 2 of 3 by correlation, on 1 clips",
        "fastvmt is number 3 of 3 by seconds, on 1 clips",
    ]
    assert ranks(rows[1:3]) == [] and ranks([]) == []


def test_a_table_compares_clip_by_clip_and_counts_them():
    """A method with fewer clips is compared on those; a measure that one of its clips lacks says so."""
    rows = [row_of("fastvmt", "1", 0.5, 10), row_of("fastvmt", "2", 0.7, 10), row_of("moft", "2", 0.8, 10)]
    rows += [{**row_of("moft", "3", 0.0, 10), "published": float("nan")}]
    (moft,) = table(rows, ["moft"]).splitlines()[2:]
    cells = moft.split(" | ")
    assert cells[1:3] == ["2", "+0.10 [+0.10, +0.10]"]
    assert cells[3 + MEASURES.index("published")] == "0.00 (1)" and "(" not in cells[3 + MEASURES.index("leak")]


def test_a_table_has_dashes_where_nothing_was_run(tmp_path):
    rows = [row_of("fastvmt", "1", 0.5, 10), row_of("fastvmt", "2", 0.7, 10)]
    lines = table(rows, ["fastvmt", "moft"]).splitlines()
    assert lines[2].startswith("| fastvmt | 2 | +0.00 [+0.00, +0.00] | 0.60 ±")
    assert lines[3] == "| moft | 0 " + "| - " * (1 + len(MEASURES)) + "|"
    append_rows(iter([{**rows[0], "kind": "single", "jerk": float("nan"), "leak": True}]), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        (cells,) = csv.DictReader(file)
    assert (cells["jerk"], cells["leak"], cells["seconds"]) == ("", "1", "10")
