"""The training of the tiny model: each idea by its formula, and all stages end to end on a smaller model and world."""

import hashlib
import itertools
import math
import re
import shutil
import string
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fastvmt import TINY_MOTION
from wan_mini.config import TINY, TINY_UMT5, TINY_VAE, DiTConfig, UMT5Config, VAEConfig
from wan_mini.dit import WanDiT
from wan_mini.generate import SAMPLING
from wan_mini.load import load_vae, load_wan
from wan_mini.runs.cli import run
from wan_mini.tiny import data, loop, train, world
from wan_mini.tiny.loop import Job, Recipe, learning_rate_factor, update_ema
from wan_mini.tiny.matching import matching_loss
from wan_mini.tiny.parts import near_sprites, parts_loss, reader, true_parts
from wan_mini.tokenizer import Tokenizer
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

VAE = VAEConfig(dim=4, num_res_blocks=1)
CPU = torch.device("cpu")
BLOCK = train.MATCHING_BLOCK  # before a fixture sets a smaller one
DIT = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=32, text_dim=16, text_len=40)
TEXT = UMT5Config(vocab=256, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=1)
STAGES = {
    "vae": (lambda job: train.train_vae(job, VAE), Recipe(steps=20, batch=4, clips=4, warmup=2, ema=0.8)),
    "decoder": (train.train_decoder, Recipe(steps=20, batch=4, clips=4, warmup=2, ema=0.8)),
    "dit": (lambda job: train.train_dit(job, DIT, TEXT), Recipe(steps=20, batch=4, clips=4, warmup=2)),
    "motion": (lambda job: train.STAGES["motion"](job), Recipe(steps=20, batch=4, clips=4, warmup=2, ema=0.8)),
    "words": (train.train_words, Recipe(steps=20, batch=4, clips=4, warmup=2, ema=0.8)),
    "shapes": (lambda job: train.STAGES["shapes"](job), Recipe(steps=20, batch=4, clips=4, warmup=2, ema=0.8)),
}
BEFORE = dict(zip([*STAGES][1:], STAGES))  # the stage that each goes on from


def small_clip(seed: int, kind: str | None = None, frames=range(17)) -> SimpleNamespace:
    """The middle 64 x 96 pixels of half a clip."""
    clip = world.make_clip(seed, kind, frames=frames)
    return SimpleNamespace(frames=clip.frames[:, 32:96, 48:144], caption=clip.caption)


def small_places(seed: int) -> np.ndarray:
    """The matches inside that cut-out: (5,24,5,2)."""
    places = world.true_positions(seed).reshape(9, 8, 12, 9, 2)[:5, 2:6, 3:9, :5] - (
        2,
        3,
    )  # (F,H,W,F,2)
    outside = (places < -0.5) | (places > (3.5, 5.5))
    return np.where(outside.any(-1, keepdims=True), np.nan, places).reshape(5, 24, 5, 2).astype(np.float32)


def small_parts(seed: int, times) -> np.ndarray:
    """The parts inside that cut-out: (times,24,5)."""
    return true_parts(seed, times).reshape(-1, 8, 12, 5)[:, 2:6, 3:9].reshape(-1, 24, 5)


def small_near_sprites(seed: int, times) -> np.ndarray:
    """Latents near sprites inside that cut-out: (len(times),8,12)."""
    return near_sprites(seed, times)[:, 4:12, 6:18]


def job(stage: str, work: Path, **others) -> Job:
    return Job(STAGES[stage][1], work, work / "checkpoint", torch.device("cpu"), **others)


@pytest.fixture(scope="module", autouse=True)
def small_world():
    clips = [small_clip(seed) for seed in range(4)]
    frames, captions = np.stack([clip.frames for clip in clips]), [clip.caption for clip in clips]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"FRAMES": 17, "HEIGHT": 64, "WIDTH": 96, "KINDS": ("single", "camera")}.items():
            patch.setattr(train, name, value)
        patch.setattr(train, "VAE_PHASES", ((0.5, 1, 32, 32, 1), (1.0, 5, 32, 32, 1 / 2)))
        patch.setattr(train, "DECODER_PHASES", ((1.0, 5, 32, 32, 1),))
        patch.setattr(
            train,
            "DIT_PHASES",
            ((0.3, [("pictures", 1, 2)]), (1.0, [("clips", 5, 1), ("closeups", 1, 2), ("clips", 3, 1)])),
        )
        for stage in ("motion", "shapes"):
            phases = ((1.0, [("clips", 5, 1), ("pictures", 1, 2)]),)
            patch.setitem(train.STAGES, stage, partial(train.train_on, stage, phases=phases))
        patch.setattr(train, "MATCHING_BLOCK", 1)
        patch.setattr(train, "make_clip", small_clip)
        patch.setattr(train, "LATENT_FRAMES", train.LATENT_FRAMES[:5])
        for name, small in (("positions", small_places), ("parts", small_parts)):
            patch.setattr(train, f"true_{name}", small)
        patch.setattr(train, "near_sprites", small_near_sprites)

        def cached(job, name, clips, convert, make=small_clip):
            parts = {data.make_picture: frames[:, :1], data.make_closeup: frames[:, :1, 16:48, 24:72]}
            return [convert(parts.get(make, frames))], captions

        yield cached


@pytest.fixture(scope="module")
def whole(small_world, tmp_path_factory) -> Path:
    """The work folder of all stages, each trained in one go."""
    work = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "cached", small_world)
        for stage, (begin, _) in STAGES.items():
            begin(job(stage, work, command=f"train {stage}"))
            shutil.copytree(work / "checkpoint", work / f"after {stage}")
    return work


def state(work: Path, stage: str) -> dict:
    return torch.load(work / f"{stage}.pt", weights_only=True)


def test_twenty_steps_lower_the_loss_of_the_dit(whole):
    losses = state(whole, "dit")["losses"]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:2])


def test_twenty_steps_lower_the_loss_of_the_vae(whole, small_world):
    """On the same frames, since the crops of one step are harder than those of another."""
    [frames], _ = small_world(None, "", 4, lambda frames: data.to_videos(frames[:, :5], torch.device("cpu")))
    vae = WanVAE(replace(VAE, mean=(0.0,) * 16, std=(1.0,) * 16))
    losses = []
    for weights in (
        train.seeded(0, lambda: train.good_start(WanVAE(VAE))).state_dict(),
        state(whole, "vae")["ema"],
    ):
        vae.load_state_dict(weights)
        with torch.no_grad():
            losses.append(train.vae_loss(vae, frames, torch.zeros_like).item())
    assert losses[1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("stage", STAGES)
def test_pauses_change_no_bit(whole, small_world, tmp_path, monkeypatch, stage):
    if stage in BEFORE:
        shutil.copytree(whole / f"after {BEFORE[stage]}", tmp_path / "checkpoint")
    monkeypatch.setattr(train, "cached", small_world)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count().__next__))  # about one call a step
    with pytest.raises(SystemExit, match="the same command goes on"):
        STAGES[stage][0](job(stage, tmp_path, deadline=13))
    assert 10 <= len(state(tmp_path, stage)["losses"]) < 15
    STAGES[stage][0](job(stage, tmp_path))
    ours, wanted = state(tmp_path, stage), state(whole, stage)
    assert ours["losses"] == wanted["losses"]
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in wanted[part].items())
    for result in (whole / f"after {stage}").glob("*.safetensors"):
        assert (tmp_path / "checkpoint" / result.name).read_bytes() == result.read_bytes()


def test_the_decoder_learns_and_the_encoder_stays(whole):
    before, after = (load_file(whole / f"after {stage}" / train.VAE_FILE) for stage in ("vae", "decoder"))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed and all(name.startswith(("decoder.", "conv2.")) for name in changed)
    old, new = (
        load_vae(whole / f"after {s}" / train.VAE_FILE, device="cpu", dtype=torch.float32) for s in ("vae", "decoder")
    )
    assert old.config == new.config


def test_latents_meet_their_own_captions(whole, small_world, tmp_path, monkeypatch):
    """What reaches the loss, of pictures, clips and close-ups, beside what was rendered together."""
    shutil.copytree(whole / "after decoder", tmp_path / "checkpoint")
    made, seen, loss = [], [], train.flow_loss

    def cached(*args):
        made.append(small_world(*args))
        return made[-1]

    def flow_loss(model, clean, noise, sigma, ids, truth):
        assert truth == train.Truth()
        seen.extend(zip(clean.half().numpy(), ids.tolist()))
        return loss(model, clean, noise, sigma, ids, truth)

    monkeypatch.setattr(train, "cached", cached)
    monkeypatch.setattr(train, "flow_loss", flow_loss)
    monkeypatch.setattr(train, "drop_captions", lambda rng, ids, empty: ids)
    train.train_dit(job("dit", tmp_path), DIT, TEXT)
    tokenizer, known = Tokenizer.from_file(tmp_path / "tokenizer.json"), {}
    for (latents,), captions in made:
        for frames in range(1, latents.shape[2] + 1):
            for latent, caption in zip(latents[:, :, :frames], captions, strict=True):
                rows = train.token_table(tokenizer, [caption, train.casual(caption)]).tolist()
                known[latent.tobytes()] = [[i for i in row if i] for row in rows]
    assert {latent.shape for latent, _ in seen} == {(16, 1, 8, 12), (16, 5, 8, 12), (16, 3, 8, 12), (16, 1, 4, 6)}
    assert all([i for i in ids if i] in known[latent.tobytes()] for latent, ids in seen)


@pytest.mark.parametrize("stage", ["motion", "shapes"])
def test_latents_meet_their_own_truth(whole, small_world, tmp_path, monkeypatch, stage):
    """Clips come with the matches, and in the stage shapes all with the parts and sprites, of their own seed."""
    shutil.copytree(whole / f"after {BEFORE[stage]}", tmp_path / "checkpoint")
    monkeypatch.setattr(train, "cached", small_world)
    loss, seen = train.flow_loss, []

    def flow_loss(model, clean, noise, sigma, ids, truth):
        seen.append((clean, truth))
        return loss(model, clean, noise, sigma, ids, truth)

    monkeypatch.setattr(train, "flow_loss", flow_loss)
    STAGES[stage][0](job(stage, tmp_path))
    vae, sorts = train.stored_vae(job(stage, tmp_path)), {1: data.make_picture, 5: small_clip}
    known = {n: small_world(None, "", 4, partial(train.encode, vae, CPU), make)[0][0] for n, make in sorts.items()}
    for clean, truth in seen:
        frames = clean.shape[2]
        assert (truth.places is None) == (frames == 1)
        assert (truth.parts is None) == (truth.sprites is None) == (stage == "motion")
        for n, latent in enumerate(clean):
            (seed,) = (i for i, other in enumerate(known[frames]) if np.array_equal(latent.half().numpy(), other))
            times = [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]] if frames == 5 else [[seed]]
            if frames == 5:
                assert np.array_equal(truth.places[n].numpy(), small_places(seed), equal_nan=True)
            if stage == "shapes":
                middle = [0, 2, 6, 10, 14] if frames == 5 else [seed]
                assert np.array_equal(truth.parts[n].numpy(), small_parts(seed, middle).reshape(-1, 5))
                assert np.array_equal(truth.sprites[n].numpy(), small_near_sprites(seed, times))
    assert {clean.shape[2] for clean, _ in seen} == {1, 5}


def test_words_change_the_text_encoder_alone_and_shapes_leave_it(whole):
    """And twenty steps bring a new encoder nearer to what the old one says."""
    changed = []
    for before, after in (("motion", "words"), ("words", "shapes")):
        files = list((whole / f"after {after}").glob("*.safetensors"))
        changed.append({f.name for f in files if f.read_bytes() != (whole / f"after {before}" / f.name).read_bytes()})
    assert changed == [{"models_t5_umt5.safetensors"}, {"diffusion_pytorch_model.safetensors"}]
    losses = state(whole, "words")["losses"]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:2])


def test_twenty_steps_of_motion_lower_the_matching_loss(whole, small_world):
    """On the same clean clips, before and after; the block's own velocity stays a loss beside it."""
    places = torch.from_numpy(np.stack([small_places(seed) for seed in range(4)]))
    losses = []
    for stage in ("dit", "motion"):
        wan = load_wan(whole / f"after {stage}", device="cpu", dtype=torch.float32)
        (latents,), _ = small_world(None, "", 4, partial(train.encode, wan.vae, CPU))
        with torch.no_grad():
            q, k = wan.dit(torch.from_numpy(latents).float(), torch.zeros(4), torch.zeros(4, 1, 16), qk_block=1)
        losses.append(matching_loss(q, k, places, (5, 4, 6), train.MATCHING_TAU).item())
    assert losses[1] < 0.98 * losses[0], losses


def test_twenty_steps_of_shapes_lower_the_loss_of_the_parts(whole, small_world):
    """On the same clean pictures: the reader as it began, before the stage, and as it became, after it."""
    parts = torch.from_numpy(np.concatenate([small_parts(seed, [0]) for seed in range(4)]))  # (4,24,5)
    losses = []
    for stage in ("motion", "shapes"):
        wan = load_wan(whole / f"after {stage}", device="cpu", dtype=torch.float32)
        read = train.seeded(0, lambda: reader(DIT.dim))
        if stage == "shapes":
            ema = state(whole, "shapes")["ema"]
            read.load_state_dict({name: ema[f"reader.{name}"] for name in read.state_dict()})
        (latents,), _ = small_world(None, "", 4, partial(train.encode, wan.vae, CPU), data.make_picture)
        with torch.no_grad(), train.stream_after(wan.dit.blocks[0]) as streams:
            wan.dit(torch.from_numpy(latents).float(), torch.zeros(4), torch.zeros(4, 1, 16))
            losses.append(parts_loss(read(streams[0]), parts).item())
    assert losses[1] < 0.9 * losses[0], losses


def test_matching_is_taught_where_the_transfer_reads():
    assert (TINY_MOTION.block, TINY_MOTION.tau) == (BLOCK, train.MATCHING_TAU)


def test_it_is_sampled_as_it_was_trained():
    """With the shift of its noise levels, and away from the prompt that stood in for those left out: no words."""
    assert (TINY_MOTION.shift, TINY_MOTION.cfg, TINY_MOTION.negative) == SAMPLING["tiny"]
    assert (TINY_MOTION.shift, TINY_MOTION.negative) == (train.SHIFT, train.EMPTY) == (3.0, "")


def test_other_settings_do_not_go_on(whole, small_world, monkeypatch):
    monkeypatch.setattr(train, "cached", small_world)
    with pytest.raises(ValueError, match="use the same, or another --work"):
        STAGES["vae"][0](job("vae", whole, seed=1))


def test_the_checkpoint_loads_and_is_the_average(whole):
    wan = load_wan(whole / "checkpoint", device="cpu", dtype=torch.float32)
    ema = state(whole, "shapes")["ema"]
    for name, module in (("dit", wan.dit), ("text", wan.text_encoder)):
        assert all(torch.equal(x, ema[f"{name}.{key}"].half().float()) for key, x in module.state_dict().items())
    assert (wan.dit.config, wan.text_encoder.config) == (DIT, TEXT)


def test_the_latents_are_normalized(whole, small_world):
    wan = load_wan(whole / "checkpoint", device="cpu", dtype=torch.float32)
    [frames], _ = small_world(None, "", 4, lambda frames: frames)
    latents = train.encode(wan.vae, torch.device("cpu"), frames).astype(np.float32)
    assert np.abs(latents.mean((0, 2, 3, 4))).max() < 0.01
    assert np.abs(latents.std((0, 2, 3, 4)) - 1).max() < 0.01


def test_the_readme_tells_the_truth(whole):
    folder = whole / "checkpoint"
    text = (folder / "README.md").read_text("utf-8")
    named = re.findall(r"^\| (\S+) \| (\d+) \| `(\w{64})` \|$", text, re.M)
    there = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert {name for name, _, _ in named} == set(there) - {"README.md"}
    for name, size, sha256 in named:
        assert (len(there[name]), hashlib.sha256(there[name]).hexdigest()) == (int(size), sha256)
    for stage in STAGES:
        assert f"| command | train {stage} |" in text
        assert f"| final loss | {np.mean(state(whole, stage)['losses']):.4f}".rstrip("0") in text


def test_pictures_are_drawn(whole):
    sizes = {"vae-samples": (3 * 96, 4 * 64), "dit-samples": (3 * 96, 2 * 64), "vae-loss": (720, 360)}
    for name, size in sizes.items():
        assert Image.open(whole / f"{name}.png").size == size
    falling = np.asarray(loop.draw_curve(np.geomspace(1, 0.01, 50).tolist()))
    rows, columns = np.nonzero((falling == (0, 0, 128)).all(-1))
    assert np.corrcoef(rows, columns)[0, 1] > 0.99  # a straight line down: the scale is logarithmic


def test_the_shipped_sizes_fit_16_megabytes():
    with torch.device("meta"):
        modules = WanDiT(TINY), WanVAE(TINY_VAE), UMT5Encoder(TINY_UMT5)
    assert 2 * sum(x.numel() for module in modules for x in module.parameters()) < 15.5e6  # float16; the rest is small


def test_noise_levels_are_uniform_before_the_shift():
    rng = np.random.default_rng(0)
    sigma = torch.stack([train.sample_sigma(rng, 64) for _ in range(200)])
    u = sigma / (3 - 2 * sigma)  # the inverse of s = 3 u / (1 + 2 u)
    assert sigma.min() >= 0 and sigma.max() <= 1
    assert torch.allclose(u.sort(1).values.diff(dim=1), torch.tensor(1 / 64), atol=1e-4)  # evenly spaced
    for q in (0.1, 0.5, 0.9):
        assert u.quantile(q).item() == pytest.approx(q, abs=0.01)
    assert sigma.median().item() == pytest.approx(0.75, abs=0.01)


def test_a_tenth_of_the_captions_is_dropped():
    ids, empty = torch.arange(40000).reshape(20000, 2) + 5, torch.tensor([1, 0])
    out = train.drop_captions(np.random.default_rng(0), ids, empty)
    dropped = (out == empty).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(out[~dropped], ids[~dropped])


class Still(nn.Module):
    """A DiT that predicts no velocity at all, and remembers what it was asked; its block passes on zeros."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])

    def forward(self, noisy, timestep, text):
        self.noisy, self.timestep, self.text = noisy, timestep, text
        self.blocks[0](torch.zeros(len(noisy), 3, 8))
        return torch.zeros_like(noisy)


class Ones(nn.Module):
    def forward(self, ids, mask):
        return torch.ones(*ids.shape, 6)


def test_the_loss_wants_noise_minus_clean_and_hides_padding():
    clean, noise, sigma = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2), torch.tensor([0.25, 1.0])
    ids, dit = torch.tensor([[7, 1, 0], [7, 8, 1]]), Still()
    loss = train.flow_loss({"dit": dit, "text": Ones()}, clean, noise, sigma, ids, train.Truth())
    assert loss.item() == pytest.approx((noise - clean).square().mean().item())
    assert torch.allclose(dit.noisy[0], 0.75 * clean[0] + 0.25 * noise[0])
    assert torch.equal(dit.noisy[1], noise[1])
    assert dit.timestep.tolist() == [250, 1000]
    assert torch.equal(dit.text[..., 0], (ids != 0).float())


def test_sprites_count_six_times_where_they_can_be_seen():
    """Of two clips, one too noisy: its sprites count as its ground does."""
    clean, noise, sigma = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2), torch.tensor([0.8, 0.81])
    sprites, ids = torch.rand(2, 3, 2, 2) < 0.3, torch.ones(2, 3, dtype=torch.long)
    truth = train.Truth(sprites=sprites)
    loss = train.flow_loss({"dit": Still(), "text": Ones()}, clean, noise, sigma, ids, truth)
    error = (noise - clean).square().mean(1)  # (B,F,h,w)
    weight = torch.ones(2, 3, 2, 2)
    weight[0][sprites[0]] = 6
    assert loss.item() == pytest.approx(((weight * error).sum() / weight.sum()).item(), rel=1e-5)


def test_the_parts_are_read_off_the_stream():
    clean, noise, sigma = torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 4, 1, 2, 2), torch.tensor([0.5])
    parts, read = torch.tensor([[[1.0, 2.0, 0.5, 0.5, 1.0], [0] * 5, [0] * 5]]), reader(8)
    model = {"dit": Still(), "text": Ones(), "reader": read}
    loss = train.flow_loss(model, clean, noise, sigma, torch.ones(1, 3, dtype=torch.long), train.Truth(parts=parts))
    wanted = train.PARTS_WEIGHT * parts_loss(read(torch.zeros(1, 3, 8)), parts)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and wanted > 0


def test_the_average_follows_its_formula():
    slow, fast = nn.Linear(2, 2), nn.Linear(2, 2)
    before = slow.weight.detach().clone()
    for step, decay in ((0, 0.1), (10**6, 0.999)):
        slow.weight.data = before.clone()
        update_ema(slow, fast, step, 0.999)
        assert torch.allclose(slow.weight, decay * before + (1 - decay) * fast.weight)


def test_the_learning_rate_warms_up_and_ends_at_zero():
    recipe = Recipe(steps=1000, batch=1, clips=1, warmup=100)
    factors = [learning_rate_factor(step, recipe) for step in range(1001)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[500] == pytest.approx(0.5)
    assert factors[1000] == 0
    assert factors[:90] == sorted(factors[:90]) and factors[99:] == sorted(factors[99:], reverse=True)
    bent = replace(recipe, decay=((0, 1), (0.2, 0.4), (1, 0)))
    assert [learning_rate_factor(step, bent) for step in (100, 200, 600)] == pytest.approx([0.7, 0.4, 0.2])


def test_the_vae_begins_as_a_picture_model():
    """Each frame that is kept is coded as if it were alone, and comes back four times."""
    vae, video = train.good_start(WanVAE(VAE)), torch.rand(1, 3, 9, 16, 16)
    with torch.no_grad():
        latents = vae.encode(video)
        alone = torch.cat([vae.encode(video[:, :, [t]]) for t in (0, 4, 8)], dim=2)
        frames = vae.decode(latents)
    assert torch.allclose(latents, alone, atol=1e-5)
    assert torch.allclose(frames[:, :, 1:5], frames[:, :, 1:2].expand(-1, -1, 4, -1, -1), atol=1e-5)


def test_crops_follow_the_phases():
    shards = [np.random.default_rng(0).integers(256, size=(2, 17, 64, 96, 3), dtype=np.uint8)]
    assert data.crops(np.random.default_rng(0), shards, train.VAE_PHASES, 0.0, 6).shape == (6, 1, 32, 32, 3)
    assert data.crops(np.random.default_rng(0), shards, train.VAE_PHASES, 0.5, 6).shape == (3, 5, 32, 32, 3)
    assert len(data.crops(np.random.default_rng(0), shards, train.VAE_PHASES, 0.999, 1)) == 1


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [world.make_clip(seed, frames=[]).caption for seed in range(500)]


@pytest.fixture(scope="module")
def tokenizer(captions) -> Tokenizer:
    return Tokenizer(train.grammar_tokenizer([*captions, *map(train.casual, captions)]))


def test_one_piece_a_word(tokenizer, captions):
    nouns = [noun for thing in (*world.SHAPES.values(), *world.BACKGROUNDS.values()) for noun in thing[-1]]
    for text in [*captions, *map(train.casual, captions), *world.COLORS, *nouns]:
        ids = tokenizer.encode(text)
        assert len(ids) == len(re.findall(r"\w+|[.,]", text)) + 1, text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.pieces) <= TINY_UMT5.vocab


def test_any_ascii_prompt_encodes(tokenizer):
    for text in (string.printable.strip(), "Xylophones, 42% of them: {Zebra}!", "reddish discus"):
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id not in ids
        assert tokenizer.decode(ids) == text


def test_casual_captions():
    assert train.casual("A red disc on sand.") == "a red disc on sand"


def test_token_table_is_padded_with_zeros(tokenizer):
    table = train.token_table(tokenizer, ["a red disc", ""])
    assert table.shape == (2, 4) and table[1].tolist() == [1, 0, 0, 0]


def test_the_cache_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 2)
    calls = []

    def convert(frames):
        calls.append(len(frames))
        return frames[:, :, 0, 0]

    task = Job(Recipe(steps=1, batch=1, clips=3), tmp_path, tmp_path, torch.device("cpu"), deadline=0.0)
    with pytest.raises(SystemExit, match="paused while making corners"):
        data.cached(task, "corners", 3, convert)
    task = Job(task.recipe, tmp_path, tmp_path, torch.device("cpu"), deadline=math.inf)
    for _ in range(2):
        shards, captions = data.cached(task, "corners", 3, convert)
    clips = [world.make_clip(seed) for seed in range(3)]
    assert calls == [2, 1]
    assert np.array_equal(np.concatenate(shards), np.stack([clip.frames[:, 0, 0] for clip in clips]))
    assert captions == [clip.caption for clip in clips]
    (pictures, last), captions = data.cached(task, "pictures", 3, lambda frames: frames, data.make_picture)
    clips = [data.make_picture(seed) for seed in range(3)]
    assert np.array_equal(np.concatenate([pictures, last]), np.stack([clip.frames for clip in clips]))
    assert pictures.shape == (2, 1, world.HEIGHT, world.WIDTH, 3) and captions == [clip.caption for clip in clips]
    (tmp_path / "world.py").write_text("# another world")
    monkeypatch.setattr(world, "__file__", str(tmp_path / "world.py"))
    data.cached(task, "corners", 3, convert)
    assert calls == [2, 1, 2, 1]


def test_a_closeup_is_a_part_of_its_picture_with_a_sprite():
    for seed in range(20):
        picture, closeup = data.make_picture(seed), data.make_closeup(seed)
        assert closeup.frames.shape == (1, 64, 96, 3) and closeup.caption == picture.caption
        places = np.lib.stride_tricks.sliding_window_view(picture.frames[0], (64, 96, 3))[:, :, 0]  # (65,97,64,96,3)
        assert (places == closeup.frames[0]).all((2, 3, 4)).any()
        vivid = np.ptp(closeup.frames.astype(int), axis=-1) > world.VIVID
        assert vivid.mean() > 0.02 or not picture.objects


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vae", "--steps", "0"], "--steps, --batch, --clips, --workers and --minutes must be positive"),
        (["vae", "--minutes", "0"], "must be positive"),
        (["vae", "--device", "abacus"], "device abacus is not available here"),
        (["dit", "--device", "cpu"], "run the stage vae with the same --folder first"),
        (["motion", "--device", "cpu"], "run the stage dit with the same --folder first"),
        (["paint"], "invalid choice: 'paint'"),
        (["vae", "--steps", "many"], "invalid int value: 'many'"),
    ],
)
def test_errors_are_one_line(argv, message, tmp_path, capsys):
    try:
        code = run(train.program, [*argv, "--work", str(tmp_path), "--folder", str(tmp_path)])
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
