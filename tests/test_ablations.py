"""Ablations of the tiny DiT's recipe: what each changes, its loss, and the program."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import ablations
from benchmarks.ablations import ABLATIONS, MEASURES, Ablation, ablation_loss, recipe_of, routed_velocity
from benchmarks.metrics import closeups
from benchmarks.metrics.closeups import SMALL, name_another_shape, shrink
from benchmarks.metrics.rows import read_rows
from wan_mini.config import TINY
from wan_mini.dit import WanDiT
from wan_mini.runs.cli import run
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.training import fast_dit
from wan_mini.tiny.training.dit import Example, flow_loss, make_text_encoder
from wan_mini.tiny.training.recipe import DIT
from wan_mini.tiny.training.trainer import Job
from wan_mini.tiny.world import SHAPES, make_clip

FLOAT = torch.float32


@pytest.fixture
def dit(monkeypatch) -> WanDiT:
    monkeypatch.setattr(fast_dit, "compiled", lambda function, dynamic: function)
    torch.manual_seed(0)
    model = WanDiT(replace(TINY, dim=48, ffn_dim=96, num_layers=4)).eval()
    for weight in model.parameters():  # gates and head begin at zero
        torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.fixture
def example() -> Example:
    rng = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 3, 16, 1, 4, 8, generator=rng)
    return Example(clean, noise, torch.tensor([0.3, 0.6, 0.9]), torch.randn(3, 5, TINY.text_dim, generator=rng))


def test_every_ablation_changes_one_part():
    first = recipe_of(Ablation(), 100)
    assert first.phases[0].batches == DIT.phases[0].batches and (first.muon_lr, first.decay) == (DIT.muon_lr, 25)
    assert first.streams == DIT.streams[:1]
    assert ABLATIONS["recipe"] == Ablation() and len(set(ABLATIONS.values())) == len(ABLATIONS)
    for ablation in ABLATIONS.values():
        changed = [name for name, value in vars(ablation).items() if value != getattr(Ablation(), name)]
        assert len(changed) == (ablation != Ablation())
    fast = recipe_of(ABLATIONS["rates x 2"], 100)
    assert (fast.muon_lr, fast.adam_lr) == (2 * DIT.muon_lr, 2 * DIT.adam_lr)
    assert recipe_of(ABLATIONS["batch of 16"], 100).phases[0].batches[0].items == 16
    assert recipe_of(ABLATIONS["every caption kept"], 100).dropout == 0
    (stream,) = recipe_of(ABLATIONS["1,024 close-ups, cached"], 100).streams
    assert stream.window * stream.items == 1024
    assert 100 * 64 / (stream.reuse * stream.items) < 1  # the window never moves
    for ablation in ABLATIONS.values():  # about as large as the recipe's
        weights = sum(weight.numel() for weight in WanDiT(ablation.dit).parameters())
        assert 0.75 < weights / 3_951_232 < 1.25


def test_the_loss_is_the_recipes_but_for_the_contrast(dit, example):
    rng = np.random.default_rng(0)
    plain = ablation_loss(Ablation(), dit, example, rng, FLOAT)
    expected, _ = flow_loss(dit, example, FLOAT)
    torch.testing.assert_close(plain, expected)
    level = example.sigma[:, None, None, None, None]
    noisy = (1 - level) * example.clean + level * example.noise
    velocity, _ = fast_dit.velocity(dit, noisy, 1000 * example.sigma, example.text, FLOAT)
    target = example.noise - example.clean
    others = torch.stack([target[2], target[0], target[1]])
    contrastive = ablation_loss(Ablation(contrast=0.05), dit, example, rng, FLOAT)
    torch.testing.assert_close(contrastive, expected - 0.05 * F.mse_loss(velocity, others))


def test_half_of_the_tokens_skip_the_middle(dit, example, monkeypatch):
    calls = []

    def forward(block, x, modulation, text, cos, sin):
        calls.append((x.shape[1], cos.shape[0]))
        return fast_dit.block_forward(block, x, modulation, text, cos, sin)

    arguments = (example.noise, 1000 * example.sigma, example.text)
    monkeypatch.setattr(fast_dit, "compiled", lambda function, dynamic: forward)
    routed = routed_velocity(dit, *arguments, np.random.default_rng(3), FLOAT)
    assert calls == [(8, 8), (8, 8), (4, 4), (8, 8)]
    monkeypatch.setattr(fast_dit, "compiled", lambda function, dynamic: function)
    whole, _ = fast_dit.velocity(dit, *arguments, FLOAT)
    assert not torch.allclose(routed, whole)
    middle = dit.blocks[2]  # without it, nothing is skipped: all its outputs are zero
    for layer in (middle.self_attn.o, middle.cross_attn.o, middle.ffn[2]):
        for weight in layer.parameters():
            torch.nn.init.zeros_(weight)
    routed = routed_velocity(dit, *arguments, np.random.default_rng(3), FLOAT)
    whole, _ = fast_dit.velocity(dit, *arguments, FLOAT)
    torch.testing.assert_close(routed, whole)


def test_close_ups_shrink_by_a_third():
    frames = np.zeros((2, 1, 80, 96, 3), np.uint8)
    frames[:, :, 4:7, :3] = 90  # one block of 3x3 pixels becomes four
    small = shrink(frames)
    assert small.shape == (2, 1, *SMALL, 3) and small.dtype == np.uint8
    assert (small[:, 0, :2, :2] == 90).all() and small.sum() == 2 * 4 * 3 * 90


def test_another_shape_is_named():
    for seed in range(40):
        scene = make_clip(seed, "single", frames=[])
        wrong = name_another_shape(scene)
        ((shape, color),) = scene.objects
        assert wrong != scene.caption and color in wrong
        assert not any(f"{color} {noun}" in wrong for noun in SHAPES[shape].nouns)
    starry = SimpleNamespace(objects=(("star", "red"),), caption="A red star against a starry sky.")
    assert name_another_shape(starry) == "A red ring against a starry sky."


@pytest.mark.parametrize("ablation", [Ablation(items=4, neighbors=False), Ablation(items=4, small=True, routed=True)])
def test_a_training_is_judged_also_when_it_had_ended_before(tmp_path, monkeypatch, ablation):
    stream = replace(DIT.streams[0], items=4, window=1)
    monkeypatch.setattr(ablations, "DIT", replace(DIT, streams=(stream,), captions=200))
    monkeypatch.setattr(closeups, "SAMPLES", 16)
    monkeypatch.setattr(closeups, "SAMPLE_STEPS", 1)
    made = []
    monkeypatch.setattr(ablations, "make_text_encoder", lambda config: made.append(1) or make_text_encoder(config))
    job = Job(tmp_path, tmp_path, torch.device("cpu"), FLOAT)
    with torch.compiler.set_stance("force_eager"):
        row = ablations.train(ablation, 3, job, tmp_path / "data", CHECKPOINT)
        again = ablations.train(ablation, 3, job, tmp_path / "data", CHECKPOINT)
    assert set(row) == set(MEASURES) and row == again
    assert len(made) == 2 * ablation.neighbors
    assert row["parameters"] == 3_951_232 and row["minutes"] > 0
    assert row["psnr_05"] > row["psnr_07"] > row["psnr_09"]
    with Image.open(tmp_path / "dit-000003.png") as samples:  # 32 of them, in rows of eight
        assert samples.size == ((8 * 64, 4 * 48) if ablation.small else (8 * 96, 4 * 80))
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {"small" if ablation.small else "whole"}


def test_a_run_that_goes_on(tmp_path, monkeypatch, capsys):
    seen = []
    folders = set()

    def train(ablation, steps, job, data, model):
        seen.append((ablation, steps, job.seed))
        folders.add((job.work.name, data.name))
        return dict.fromkeys(MEASURES, 0.5 + job.seed)

    monkeypatch.setattr(ablations, "train", train)
    words = ["--csv", str(tmp_path / "a.csv"), "--work", str(tmp_path), "--device", "cpu", "--steps", "7"]
    assert run(ablations.program, [*words, "--only", "recipe", "rates x 2"]) == 0
    assert seen == [(Ablation(), 7, 0), (Ablation(rate=2.0), 7, 0)]
    assert run(ablations.program, [*words, "--only", "recipe", "--seed", "1"]) == 0
    assert run(ablations.program, [*words, "--only", "recipe"]) == 0 and len(seen) == 3
    works = sorted(work for work, _ in folders)
    assert [work.rpartition("-")[0] for work in works] == ["0-rates-x-2", "0-recipe", "1-recipe"]
    assert len({data for _, data in folders}) == 1
    changed = replace(ABLATIONS["recipe"], neighbors=False)
    monkeypatch.setitem(ABLATIONS, "recipe", changed)  # the state of the other is not judged for it
    assert run(ablations.program, [*words, "--csv", str(tmp_path / "b.csv"), "--only", "recipe"]) == 0
    assert len(folders) == 4
    monkeypatch.undo()
    monkeypatch.setattr(ablations, "train", train)
    assert "| recipe | 2 | 1 | 1 |" in capsys.readouterr().out
    assert run(ablations.program, [*words, "--only", "recipe", "--steps", "8"]) == 2
    assert "has rows of recipe with other options or weights" in capsys.readouterr().err
    assert run(ablations.program, ["--only", "nothing"]) == 2
    assert "got --only nothing: choose from recipe; text encoder without neighbors" in capsys.readouterr().err


def test_the_rows_that_ship_are_of_todays_options():
    rows = read_rows(ablations.RESULTS, MEASURES)
    args = ablations.parser().parse_args([])
    assert args.model == CHECKPOINT and rows
    for row in rows:
        assert row["settings"] == ablations.settings(row["method"], args), row["method"]
    page = (CHECKPOINT.parent / "training" / "README.md").read_text(encoding="utf-8")
    for name in {row["method"] for row in rows}:
        (row,) = (row for row in rows if row["method"] == name and row["clip"] == "0")
        cells = [f"{100 * row['shape_ok']:.0f} / {100 * row['shape_held_out']:.0f}", f"{row['wrong_shape']:.3f}"]
        denoising = " / ".join(f"{row[name]:.1f}" for name in ("psnr_05", "psnr_07", "psnr_09"))
        assert f"| {name} | {cells[0]} | {cells[1]} | {denoising} |" in page
