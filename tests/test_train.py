"""The training of the tiny model: each idea by its formula, and both stages end to end with smaller models."""

import itertools
import json
import re
import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastvmt import MotionConfig
from wan_mini.config import TINY, TINY_UMT5, TINY_VAE, DiTConfig, UMT5Config, VAEConfig
from wan_mini.dit import Block, WanDiT
from wan_mini.errors import UserError
from wan_mini.files import Unwritable
from wan_mini.hashes import sha256_file
from wan_mini.load import load_vae, load_wan
from wan_mini.runs.cli import run
from wan_mini.runs.request import load_preset
from wan_mini.tiny import demo
from wan_mini.tiny.training import __main__ as command
from wan_mini.tiny.training import dit, fast_dit, fast_vae, recipe, trainer, vae
from wan_mini.tiny.training.data import CLOSEUP, Pool, Sampler, crop_object, make_next, make_shard
from wan_mini.tiny.training.grammar import encode_text, token_table
from wan_mini.tiny.training.recipe import Batch, Phase, Recipe, Stream
from wan_mini.tiny.training.trainer import Job
from wan_mini.tiny.world import FRAMES, HELD_OUT, make_clip
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

CPU = torch.device("cpu")
ATTRIBUTES = {"color_ok", "background_ok", "shape_ok"}
VAE = VAEConfig(dim=4, num_res_blocks=1)
DIT = DiTConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=4, freq_dim=32, text_dim=16, text_len=40)
TEXT = UMT5Config(vocab=256, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=1)
COMMON = Recipe(streams=(), phases=(), muon_lr=0.02, adam_lr=3e-3, warmup=2, decay=6, ema=0.8, samples=1)
RECIPES = {
    "vae": replace(
        COMMON,
        streams=(Stream("frames", items=2, window=2, reuse=8),),
        phases=(Phase(14, (Batch("frames", 1, 4, 32, 32),)), Phase(6, (Batch("frames", 5, 2, 32, 32),))),
        statistics=4,
        noise=0.3,
    ),
    "dit": replace(
        COMMON,
        streams=(Stream("pictures", items=8, window=1, reuse=4), Stream("clips", items=2, window=1, reuse=8)),
        phases=(
            Phase(10, (Batch("pictures", 1, 4),)),
            Phase(10, (Batch("pictures", 1, 4), Batch("clips", 3, 2, matching=0.1))),
        ),
        matched=1,
        captions=200,
    ),
}
TRAIN = {
    "vae": lambda job: vae.train_vae(job, RECIPES["vae"], VAE),
    "dit": lambda job: dit.train_dit(job, RECIPES["dit"], DIT, TEXT),
}


def make_job(work: Path, **others) -> Job:
    return Job(work, work / "checkpoint", CPU, torch.float32, **{"workers": 0, **others})


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Kernels as they are: to compile them would take longer than all of these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The work folder of both stages, each trained in one go."""
    work = tmp_path_factory.mktemp("whole")
    for train in TRAIN.values():
        train(make_job(work))
    return work


def state(work: Path, stage: str) -> dict:
    return torch.load(work / f"{stage}.pt", weights_only=True)


def losses_of(work: Path, stage: str, key: str = "loss", frames: int = 1) -> list[float]:
    return [entry[key] for entry in state(work, stage)["losses"] if entry["frames"] == frames]


@pytest.mark.parametrize(("stage", "key", "frames"), [("vae", "loss", 1), ("dit", "flow", 1), ("dit", "matching", 3)])
def test_twenty_steps_lower_the_loss(whole, stage, key, frames):
    losses = losses_of(whole, stage, key, frames)
    assert len(state(whole, stage)["losses"]) == 20
    assert np.mean(losses[-2:]) < 0.9 * losses[0], losses


@pytest.mark.parametrize("stage", TRAIN)
def test_pauses_change_no_bit(whole, tmp_path, monkeypatch, stage):
    """Nor does a worker process, which makes the pixels of the stage vae after the pause."""
    if stage == "dit":
        (tmp_path / "checkpoint").mkdir()
        (tmp_path / "checkpoint" / vae.VAE_FILE).write_bytes((whole / "checkpoint" / vae.VAE_FILE).read_bytes())
    with monkeypatch.context() as patch:  # a clock that ticks when it is read, about four times a step
        patch.setattr(trainer, "time", SimpleNamespace(monotonic=itertools.count().__next__))
        with pytest.raises(SystemExit, match="the same command goes on"):
            TRAIN[stage](make_job(tmp_path, deadline=50))
    assert 8 <= state(tmp_path, stage)["step"] <= 15
    TRAIN[stage](make_job(tmp_path, workers=int(stage == "vae")))
    ours, expected = state(tmp_path, stage), state(whole, stage)
    for one, other in zip(ours["losses"], expected["losses"], strict=True):
        assert {key: one[key] for key in one if key[-2:] != "_s"} == {
            key: other[key] for key in one if key[-2:] != "_s"
        }
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in expected[part].items())
    assert ours["drawn"] == expected["drawn"]
    for result in (tmp_path / "checkpoint").glob("*.safetensors"):
        assert result.read_bytes() == (whole / "checkpoint" / result.name).read_bytes()


def test_a_finished_training_without_a_record_gets_it(whole, tmp_path):
    """As if it had been stopped between its last step and its record."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoint" / "training.json"
    stages = json.loads(file.read_text("utf-8"))
    expected = stages.pop("dit")
    file.write_text(json.dumps(stages), "utf-8")
    TRAIN["dit"](make_job(tmp_path))
    assert json.loads(file.read_text("utf-8"))["dit"] == expected


def test_a_damaged_state_is_named_and_stays(whole, tmp_path):
    """Truncated, of other bytes, empty, a pickle that would run code, without a part, a list."""
    good = torch.load(whole / "vae.pt", weights_only=True)
    data = (whole / "vae.pt").read_bytes()
    without = {name: value for name, value in good.items() if name != "ema"}
    other = {**good, "model": {"x": torch.ones(1)}}
    for content in (data[: len(data) // 2], b"junk" * 100, b"", {"settings": print}, without, [good], other):
        file = tmp_path / "vae.pt"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        before = file.read_bytes()
        with pytest.raises(UserError, match=r"vae.pt is no (whole )?state \(.*\): remove it to begin anew") as error:
            TRAIN["vae"](make_job(tmp_path))
        assert "\n" not in str(error.value) and file.read_bytes() == before


def test_a_full_disk_leaves_the_last_state(whole, tmp_path, monkeypatch):
    data = (whole / "vae.pt").read_bytes()
    (tmp_path / "vae.pt").write_bytes(data)

    def fails(state, file):
        file.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")  # as torch says it

    monkeypatch.setattr(torch, "save", fails)
    made = object.__new__(trainer.Trainer)
    made.file, made.step, made.seconds, made.losses = tmp_path / "vae.pt", 1, 0.0, []
    made.parts, made.settings, made.sampler = dict, str, SimpleNamespace(drawn={})
    with pytest.raises(Unwritable, match="cannot write .*vae.pt .*: make room, the last state is whole"):
        made.save()
    assert [path.name for path in tmp_path.iterdir()] == ["vae.pt"] and (tmp_path / "vae.pt").read_bytes() == data


def test_a_training_without_matching_differs_in_that_alone(whole, tmp_path, monkeypatch):
    """And has a state, a curve and a record of its own name."""
    made = []

    class Stop(Exception):
        pass

    def make_trainer(name, recipe, *others):
        made.extend((name, recipe))
        return SimpleNamespace(ema=None)

    def make_probe(samples, dtype, encode, file):
        made.append(file.name)
        raise Stop

    monkeypatch.setattr(dit, "Trainer", make_trainer)
    monkeypatch.setattr(dit, "Probe", make_probe)
    with pytest.raises(Stop):
        command.TRAIN["dit-without-matching"](replace(make_job(tmp_path), folder=whole / "checkpoint"))
    assert made[0] == "dit-without-matching" and made[1] != recipe.DIT
    assert made[2] == "dit-without-matching-curve.jsonl"
    text = json.dumps(asdict(recipe.DIT))
    assert json.dumps(asdict(made[1])) == re.sub(r'"matching": [\d.]+', '"matching": 0.0', text)


def test_the_weights_of_another_stage_are_not_replaced(tmp_path, monkeypatch, capsys):
    """Not of one that has only begun either; and it is said before the VAE is trained."""
    began = []

    def pauses(name, job):
        began.append(name)
        raise SystemExit(f"paused {name}")

    for name in command.TRAIN:
        monkeypatch.setitem(command.TRAIN, name, partial(pauses, name))
    words = ["--work", str(tmp_path), "--folder", str(tmp_path / "checkpoint"), "--device", "cpu"]
    for _ in range(2):  # the same one goes on
        with pytest.raises(SystemExit, match="paused"):
            command.program(["dit-without-matching", *words])
    for stage in ("dit", "all"):
        assert run(command.program, [stage, *words]) == 2
        assert "checkpoint has the DiT of dit-without-matching: use another --folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="paused vae"):
        command.program(["vae", *words])
    assert began == ["dit-without-matching", "dit-without-matching", "vae"]


def test_a_fresh_folder_is_made(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(command.TRAIN, "vae", seen.append)
    work = tmp_path / "outputs" / "tiny"
    assert run(command.program, ["vae", "--work", str(work), "--device", "cpu"]) == 0
    assert work.is_dir() and seen[0].work == work


def test_other_settings_do_not_go_on(whole):
    with pytest.raises(ValueError, match="use these, or another --work"):
        TRAIN["vae"](make_job(whole, seed=1))


def test_the_record_says_how_the_checkpoint_was_made(whole):
    folder = whole / "checkpoint"
    stages = json.loads((folder / "training.json").read_text())
    assert list(stages) == ["vae", "dit"]
    for name, facts in stages.items():
        assert facts["command"] == f"python -m wan_mini.tiny.training {name} --seed 0"
        assert facts["steps"] == 20 and facts["recipe"]["decay"] == 6
        losses = [entry["loss"] for entry in state(whole, name)["losses"]]
        assert facts["losses of the first 200 steps"] == pytest.approx(losses, abs=1e-5)
    assert "PSNR of 3 held-out clips, dB" in stages["vae"] and stages["dit"]["pictures"].keys() == ATTRIBUTES
    page = (folder / "README.md").read_text()
    shares = [f"{name}: {share}" for name, share in stages["dit"]["pictures"].items()]
    assert f"| pictures | {'; '.join(shares)} |" in page
    at_03 = ", ".join(map(str, stages["dit"]["matching"]["0.3"]))
    assert f"| matching | 0.3: {at_03}; 0.5: " in page
    rows = re.findall(r"^\| (\S+) \| (\d+) \| `(\w{64})` \|$", page, re.MULTILINE)
    files = {path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"}
    assert {folder / name for name, _, _ in rows} == files
    for name, size, digest in rows:
        assert (int(size), digest) == ((folder / name).stat().st_size, sha256_file(folder / name))


def test_the_checkpoint_is_the_average_in_float16(whole):
    wan = load_wan(whole / "checkpoint", device="cpu", dtype=torch.float32)
    ema = state(whole, "dit")["ema"]
    assert all(torch.equal(x, ema[key].half().float()) for key, x in wan.dit.state_dict().items())
    average = state(whole, "vae")["ema"]
    assert all(torch.equal(x, average[key].half().float()) for key, x in wan.vae.state_dict().items())
    assert (wan.dit.config, wan.text_encoder.config) == (DIT, TEXT)


def test_the_latents_are_normalized(whole):
    """Over the clips that they were measured on."""
    wan_vae = load_vae(whole / "checkpoint", device="cpu", dtype=torch.float32)
    frames = np.stack([make_clip(seed).frames for seed in range(4)])
    with torch.no_grad():
        latents = torch.cat(
            [fast_vae.encode(wan_vae, vae.to_videos(clip[None], CPU), torch.float32) for clip in frames]
        )
    assert latents.mean((0, 2, 3, 4)).abs().max() < 1e-3
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 1e-3


def test_every_save_leaves_samples_and_figures(whole):
    assert Image.open(whole / "vae-000020.png").size == (3 * 192, 3 * 128)
    assert Image.open(whole / "dit-000020.png").size == (8 * 96, 2 * 64)  # 4 pictures, a clip in 8 frames, 4 empty
    (line,) = (whole / "dit-curve.jsonl").read_text("utf-8").splitlines()
    figures = json.loads(line)
    assert figures["step"] == 20 and set(figures["pictures"]) == {"color_ok", "background_ok", "shape_ok"}
    assert len(figures["matching"]["0.5"]) == DIT.num_layers
    assert all(0 <= share <= 1 for row in figures["matching"].values() for share in row)


# Data


def test_data_are_fresh(tmp_path):
    """Windows move on at the stated rate, no seed comes back, streams share none, held-out pairs are never drawn."""
    streams = (Stream("pictures", items=8, window=2, reuse=3), Stream("frames", items=2, window=1, reuse=2))
    pool = Pool(tmp_path, lambda frames: frames[:, 0, 0, 0])
    sampler = Sampler(pool, streams)
    rng = np.random.default_rng(0)
    seeds: dict[str, list[int]] = {"pictures": [], "frames": []}
    last = {"pictures": 0, "frames": 0}
    for _ in range(20):
        for name, count in (("pictures", 12), ("frames", 2)):
            drawn = [int(item["seeds"]) for item in sampler.draw(name, count, rng)]
            assert min(drawn) >= last[name] // 8 * 8 or name == "frames"
            seeds[name] += drawn
    for stream in streams:
        first = sampler.first(stream)
        assert first == len(seeds[stream.name]) // (stream.reuse * stream.items) >= 5
        assert not [number for name, number in pool.open if name == stream.name and number < first]
        uses = len(seeds[stream.name]) / len(set(seeds[stream.name]))
        assert uses == pytest.approx(stream.reuse, rel=0.4)
    assert not set(seeds["pictures"]) & set(seeds["frames"])
    assert len(list(tmp_path.glob("*.npz"))) == len(pool.open)  # what has been used is gone
    for seed in {*seeds["pictures"], *seeds["frames"]}:
        assert HELD_OUT.isdisjoint(make_clip(seed, frames=[]).objects)


def test_shards_follow_each_other():
    stream = Stream("pictures", items=3, window=1, reuse=1)
    shards = [make_shard(stream, number, lambda frames: frames) for number in (0, 1)]
    seeds = np.concatenate([shard["seeds"] for shard in shards]).tolist()
    assert np.diff(seeds).tolist() == [1] * 5
    for seed, caption, picture in zip(seeds[:3], shards[0]["caption"], shards[0]["latents"], strict=True):
        clip = make_clip(seed, frames=[seed % FRAMES])
        assert caption == clip.caption and np.array_equal(picture, clip.frames)


@pytest.mark.parametrize(("kind", "margin"), [("single", 0.15), ("articulated", 0.32)])
def test_closeups_show_one_object_whole_enough(kind, margin):
    """The middle of it and its limb is well inside, anywhere near the crop's middle, and so is the body."""
    middles, bodies = [], []
    for seed in range(40):
        clip = make_clip(seed, kind, frames=[seed % FRAMES])
        frames = crop_object(clip, seed)
        assert frames.shape == (1, *CLOSEUP, 3)
        windows = np.lib.stride_tricks.sliding_window_view(clip.frames[0], (*CLOSEUP, 3))[..., 0, :, :, :]
        found = np.argwhere((windows == frames[0]).all((2, 3, 4)))
        assert len(found) == 1  # it is part of the frame
        middles.append((clip.tracks[:, 0].mean(0) - found[0]) / CLOSEUP)
        body = clip.tracks[clip.owners == 0, 0][0]
        bodies.append((body - found[0]) / CLOSEUP)
    assert np.min(middles) > margin and np.max(middles) < 1 - margin and np.std(middles) > 0.05
    assert np.min(bodies) > 0.05 and np.max(bodies) < 0.95


def test_every_second_closeup_shows_a_limb():
    shard = make_shard(Stream("closeups", items=4, window=1, reuse=1), 3, lambda frames: frames)
    for index, seed in enumerate(shard["seeds"].tolist()):
        kind = "articulated" if seed % 2 else "single"
        clip = make_clip(seed, kind, frames=[seed % FRAMES])
        assert np.array_equal(shard["latents"][index], crop_object(clip, seed))
        assert shard["caption"][index] == clip.caption
    assert set(shard["seeds"] % 2) == {0, 1}


def test_groups_show_several_objects():
    shard = make_shard(Stream("groups", items=3, window=1, reuse=1), 2, lambda frames: frames)
    for seed, caption, picture in zip(shard["seeds"].tolist(), shard["caption"], shard["latents"], strict=True):
        clip = make_clip(seed, "several", frames=[seed % FRAMES])
        assert caption == clip.caption and np.array_equal(picture, clip.frames)


def test_a_worker_makes_what_nobody_makes(tmp_path):
    """The next shard of the window that is neither there nor begun by another process."""
    pool = Pool(tmp_path, lambda frames: frames)
    stream = Stream("pictures", items=1, window=2, reuse=1)
    assert not make_next(pool, [stream])  # no training has begun
    (tmp_path / "windows.txt").write_text("pictures=5")
    pool.make(stream, 5)
    pool.file(stream, 6).with_suffix(".claim").touch()
    assert make_next(pool, [stream])
    assert pool.file(stream, 7).exists() and not pool.file(stream, 6).exists()


def test_crops_are_where_something_changes():
    frames = np.zeros((17, 64, 96, 3), np.uint8)
    frames[:, :, 48:] = np.arange(17)[:, None, None, None]
    rng = np.random.default_rng(0)
    crops = [vae.crop(frames, Batch("frames", 5, 1, 32, 32), rng) for _ in range(200)]
    assert {crop.shape for crop in crops} == {(5, 32, 32, 3)}
    assert np.mean([(crop[-1] != crop[0]).any() for crop in crops]) > 0.95  # of random ones 0.75
    assert vae.crop(frames, Batch("frames", 9, 1), rng).shape == (9, 64, 96, 3)


def test_a_tenth_of_the_captions_is_dropped_and_half_is_casual():
    prompts = dit.draw_prompts(np.random.default_rng(0), ["A red disc."] * 20000, 0.1)
    assert prompts.count("") / 20000 == pytest.approx(0.1, abs=0.01)
    assert prompts.count("a red disc") / 20000 == pytest.approx(0.45, abs=0.01)
    assert set(prompts) == {"", "A red disc.", "a red disc"}


def test_noise_levels_are_uniform_before_the_shift():
    rng = np.random.default_rng(0)
    sigma = torch.stack([dit.sample_sigma(rng, 64) for _ in range(200)])
    u = sigma / (3 - 2 * sigma)  # the inverse of s = 3 u / (1 + 2 u)
    assert sigma.min() >= 0 and sigma.max() <= 1
    assert torch.allclose(u.sort(1).values.diff(dim=1), torch.tensor(1 / 64), atol=1e-4)  # evenly spaced
    for q in (0.1, 0.5, 0.9):
        assert u.quantile(q).item() == pytest.approx(q, abs=0.01)


# The loop


def test_the_learning_rate_warms_up_and_ends_at_zero():
    steps = replace(COMMON, phases=(Phase(1000, ()),), warmup=100, decay=400)
    factors = [trainer.rate_factor(step, steps) for step in range(1001)]
    assert factors[0] == pytest.approx(0.01) and factors[99] == factors[600] == 1 and factors[1000] == 0
    assert factors[800] == pytest.approx(0.5)
    assert factors[:90] == sorted(factors[:90]) and factors[99:] == sorted(factors[99:], reverse=True)


def test_batches_take_turns_in_each_phase():
    sizes = [trainer.batch_at(step, RECIPES["dit"]).frames for step in range(20)]
    assert sizes == [1] * 10 + [1, 3] * 5
    for stage in (recipe.VAE, recipe.DIT):
        names = {stream.name for stream in stage.streams}
        assert {trainer.batch_at(step, stage).stream for step in range(stage.steps)} == names


def test_the_average_follows_its_formula():
    slow, fast = nn.Linear(2, 2), nn.Linear(2, 2)
    before = slow.weight.detach().clone()
    for step, decay in ((0, 0.1), (10**6, 0.999)):
        slow.weight.data = before.clone()
        trainer.update_ema(slow, fast, step, 0.999)
        assert torch.allclose(slow.weight, decay * before + (1 - decay) * fast.weight)


def test_the_text_encoder_stays_as_the_seed_made_it(whole):
    torch.manual_seed(0)
    WanDiT(DIT)  # drawn first
    expected = dit.make_text_encoder(TEXT).state_dict()
    wan = load_wan(whole / "checkpoint", device="cpu", dtype=torch.float32)
    assert all(torch.equal(x, expected[key]) for key, x in wan.text_encoder.state_dict().items())


def test_a_color_tells_whose_it_is(tmp_path):
    """Its vector changes with the noun next to it, and hardly with another object's."""
    tokenizer = dit.make_tokenizer(tmp_path / "tokenizer.json", 200)
    torch.manual_seed(1)
    encoder = dit.make_text_encoder(TINY_UMT5)
    captions = ("a red disc and a blue star", "a red cross and a blue star", "a red disc and a blue cross")
    ids = token_table(tokenizer, captions)
    with torch.no_grad():
        vectors = encode_text(encoder, ids)  # (3,L,C)
    (place,) = (ids[0] == tokenizer.encode("red")[0]).nonzero()[0].tolist()
    plain, own, other = vectors[:, place]
    assert (own - plain).norm() > 5 * (other - plain).norm()


def test_every_parameter_is_trained_once():
    model = WanDiT(DIT)
    muon, adam = trainer.make_optimizers(model, COMMON, torch.float32)
    groups = [*muon.param_groups, *adam.param_groups]
    assert [group["peak_lr"] for group in groups] == [0.02, 3e-3]
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in model.parameters())


def test_the_loss_is_of_noise_minus_clean():
    """With a head of zeros, which predicts no velocity; the matching loss is added with its weight."""
    model = WanDiT(DIT)
    for parameter in model.head.head.parameters():
        nn.init.zeros_(parameter)
    clean, noise = torch.randn(2, 2, 16, 3, 4, 4)
    positions = torch.zeros(1, 3, 4, 3, 2)
    example = dit.Example(clean, noise, torch.tensor([0.25, 1.0]), torch.randn(2, 3, 16), positions)
    loss, figures = dit.flow_loss(model, example, torch.float32, 0.5)
    assert figures["flow"] == pytest.approx((noise - clean).square().mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx(figures["flow"] + 0.5 * figures["matching"], rel=1e-5)
    assert dit.flow_loss(model, example, torch.float32)[0].item() == pytest.approx(figures["flow"])


def test_the_vae_begins_as_a_picture_model():
    """Each frame that is kept is coded as if it were alone, and comes back four times."""
    model, video = vae.initialize(WanVAE(VAE)), torch.rand(1, 3, 9, 16, 16)
    with torch.no_grad():
        latents = model.encode(video)
        alone = torch.cat([model.encode(video[:, :, [t]]) for t in (0, 4, 8)], dim=2)
        frames = model.decode(latents)
    assert torch.allclose(latents, alone, atol=1e-5)
    assert torch.allclose(frames[:, :, 1:5], frames[:, :, 1:2].expand(-1, -1, 4, -1, -1), atol=1e-5)


# Fast forward passes


def differences(slow: list[torch.Tensor], fast: list[torch.Tensor]) -> list[float]:
    """Of each pair, the norm of the difference over the norm."""
    return [((one - other).norm() / one.norm()).item() for one, other in zip(slow, fast, strict=True)]


def with_gradients(model: nn.Module, outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The outputs, and the gradients of a random projection of them."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_the_fast_vae_is_the_vae(frames):
    """In bfloat16, as near to float32 as vae.py is with weights in bfloat16."""
    model, video = WanVAE(VAE), torch.rand(2, 3, frames, 32, 16) * 2 - 1
    half = deepcopy(model).bfloat16()

    def results(used, encode, decode) -> list[torch.Tensor]:
        latents = encode(video)
        return with_gradients(used, (latents, decode(latents)))

    expected = results(model, model.encode, model.decode)
    rounded = results(half, lambda x: half.encode(x.bfloat16()), half.decode)
    fast = {}
    for dtype in (torch.float32, torch.bfloat16):
        encode, decode = partial(fast_vae.encode, dtype=dtype), partial(fast_vae.decode, dtype=dtype)
        fast[dtype] = results(model, partial(encode, model), partial(decode, model))
    unused = 8 if frames == 1 else 0  # weights and biases of four convolutions over time
    assert len(expected) == 2 + len(list(model.parameters())) - unused
    assert max(differences(expected, fast[torch.float32])) < 1e-3
    assert np.median(differences(expected, fast[torch.float32])) < 1e-4
    own = np.mean(differences(expected, [x.float() for x in rounded]))
    assert np.mean(differences(expected, fast[torch.bfloat16])) < 1.5 * own


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
def test_the_fast_dit_is_the_dit(dtype, limit):
    model = WanDiT(DIT)
    latents, timestep, text = torch.randn(2, 16, 3, 4, 8), torch.tensor([20.0, 900.0]), torch.randn(2, 5, 16)
    slow = with_gradients(model, (model(latents, timestep, text),))
    fast = with_gradients(model, fast_dit.velocity(model, latents, timestep, text, dtype)[:1])
    assert len(slow) == 1 + len(list(model.parameters()))
    assert np.quantile(differences(slow, fast), 0.9) < limit and max(differences(slow, fast)) < 5 * limit
    _, qk = fast_dit.velocity(model, latents, timestep, text, dtype, qk_block=2, qk_clips=1)
    expected = torch.stack(model(latents, timestep, text, qk_block=2))[:, :1]
    assert max(differences([expected], [qk])) < limit


def test_kernels_can_be_compiled():
    """As one graph each, by a backend that runs it as it is."""
    block, x, text = Block(DIT), torch.randn(2, 6, 24), torch.randn(2, 4, 24)
    arguments = (deepcopy(block), x, torch.randn(2, 6, 24), text, torch.randn(6, 1, 12), torch.randn(6, 1, 12))
    rows = (torch.randn(7, 8), torch.randn(8, 1, 1, 1))
    with torch.compiler.set_stance("default"):
        for function, inputs in ((fast_dit.block_forward, arguments), (fast_vae._norm_then_silu, rows)):
            compiled = torch.compile(function, backend="eager", fullgraph=True)
            assert torch.equal(compiled(*inputs), function(*inputs))


# The program


def test_it_is_trained_as_it_is_used():
    """With the sampler's shift, the prompt that stands for none, and supervision of the block that is read."""
    _, motion = load_preset(demo.CHECKPOINT, MotionConfig())
    assert (motion.shift, motion.negative) == (recipe.SHIFT, recipe.EMPTY)
    assert motion.block == recipe.BLOCK


def test_the_shipped_sizes_fit_16_megabytes():
    with torch.device("meta"):
        modules = WanDiT(TINY), WanVAE(TINY_VAE), UMT5Encoder(TINY_UMT5)
    assert 2 * sum(x.numel() for module in modules for x in module.parameters()) < 15.5e6  # float16; the rest is small


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vae", "--minutes", "0"], "--minutes must be above 0"),
        (["vae", "--seed", "-1"], "--seed must be at least 0"),
        (["vae", "--device", "abacus"], "device abacus is not available here"),
        (["dit", "--device", "cpu"], "run the stage vae with the same --folder first"),
        (["paint"], "invalid choice: 'paint'"),
    ],
)
def test_errors_are_one_line(argv, message, tmp_path, capsys):
    try:
        code = run(command.program, [*argv, "--work", str(tmp_path), "--folder", str(tmp_path)])
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
