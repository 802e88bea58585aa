"""The mark: exact statistics without it, the round trip to noise, offsets, and the program on the tiny model."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from wan_mini import verify as verify_module
from wan_mini.config import frames_of
from wan_mini.ffmpeg import is_installed
from wan_mini.generate import program as generate_program
from wan_mini.noise import start_noise
from wan_mini.pipeline import denoise
from wan_mini.prompts import encode_prompts
from wan_mini.runs.claim import believable_size, read_claim
from wan_mini.runs.cli import run
from wan_mini.scheduler import FlowEuler
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.verify import (
    AS_IT_IS,
    VIEWS,
    Match,
    Verifier,
    View,
    invert,
    log10_rate,
    log10_tail,
    main,
    match,
    offsets,
    parser,
    read_clip,
    z_score,
)
from wan_mini.video import read_video, write_video

CPU = ["--device", "cpu", "--dtype", "float32"]
SHAPE = (1, 16, 5, 4, 6)
ESTIMATES = {
    "a picture": torch.linspace(-3, 5, 16 * 5 * 4 * 6).reshape(SHAPE),  # nothing like noise: off center, smooth
    "noise": torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)),
    "a few values": torch.zeros(SHAPE).index_fill_(1, torch.tensor([3]), 40.0),
}


# Without the mark.


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("key", ["", "studio"])
def test_without_the_mark_z_is_standard_normal(name, key):
    """Whatever the clip: the distribution of z over seeds against its closed form."""
    z = torch.tensor([z_score(ESTIMATES[name], start_noise(SHAPE, s, key, "m")) for s in range(500)]).double()
    ranks = torch.arange(1, 501, dtype=torch.float64) / 500
    distance = (torch.special.ndtr(z.sort().values) - ranks).abs().max().item()
    assert distance < 1.95 / math.sqrt(500)  # exceeded once in a thousand
    for level in (0.1, 0.02):  # and so is the promised false-positive rate
        false = sum(log10_tail(value) <= math.log10(level) for value in z.tolist())
        assert abs(false - 500 * level) < 4 * math.sqrt(500 * level)


def test_the_size_of_an_estimate_does_not_matter():
    noise = start_noise(SHAPE, 1)
    assert z_score(noise, noise) == pytest.approx(noise.norm().item())
    assert z_score(7 * noise, noise) == pytest.approx(z_score(noise, noise))
    assert z_score(-noise, noise) == -z_score(noise, noise)
    assert z_score(torch.zeros(SHAPE), noise) == 0


def test_tails():
    """Known values; further out than floats go, the asymptotic series; and never less than the truth."""
    assert log10_tail(0) == pytest.approx(math.log10(0.5))
    assert log10_tail(1.6448536269514722) == pytest.approx(math.log10(0.05))
    assert log10_tail(4.753424308822899) == pytest.approx(-6, abs=1e-9)
    for z in (29.9, 30.1, 50.0, 200.0):
        series = -z * z / 2 - math.log(z * math.sqrt(2 * math.pi)) + math.log1p(-1 / z**2 + 3 / z**4)
        assert -1e-6 < log10_tail(z) - series / math.log(10) < 1e-3


def test_every_try_counts():
    assert log10_rate(4.753424308822899, 1000) == pytest.approx(-3, abs=1e-9)
    assert log10_rate(-5.0, 10) == 0


# Where a clip lies in its original.


def test_offsets_of_whole_and_cut_clips():
    """33 frames are 9 latent frames; the last offset leaves one of them to compare."""
    assert list(offsets(AS_IT_IS, 33)) == list(range(8))
    assert list(offsets(View(3, False), 33)) == list(range(1, 8))
    assert list(offsets(AS_IT_IS, 5)) == [0]
    assert len(VIEWS) == len(set(VIEWS)) == 8


def test_views_of_frames():
    frames = np.arange(11 * 2 * 3 * 3, dtype=np.uint8).reshape(11, 2, 3, 3)
    assert np.array_equal(AS_IT_IS.of(frames), frames[:9])
    assert np.array_equal(View(3, False).of(frames), frames[3:8])
    assert np.array_equal(View(2, True).of(frames), frames[2:11, :, ::-1])


def test_a_match_compares_the_right_frames():
    noise = start_noise((1, 16, 6, 4, 6), 3)
    whole = match(noise, noise, 3, AS_IT_IS, 0)
    assert whole.agreement == 1 and whole.z == pytest.approx(noise.norm().item())
    cut = noise[:, :, 2:5].clone()
    cut[:, :, 0] = 100  # the first of a cut clip stands for one frame, not for four: it must not count
    assert match(cut, noise, 3, AS_IT_IS, 2).z == pytest.approx(noise[:, :, 3:5].norm().item())
    assert match(cut, noise, 3, View(1, False), 2).agreement == 1
    assert abs(match(cut, noise, 3, AS_IT_IS, 1).z) < 5 > abs(match(noise, noise, 3, AS_IT_IS, 1).z)
    beyond = match(noise, noise[:, :, 3:], 3, AS_IT_IS, 0)
    assert abs(beyond.z) < 5  # an original shorter than the clip


# The way back to noise.


def euler_forward(velocity, x, scheduler):
    for index in range(len(scheduler.timesteps)):
        x = scheduler.step(index, x, velocity(x, scheduler.timesteps[index].reshape(1), None))
    return x


def test_a_constant_velocity_is_inverted_exactly():
    constant = torch.randn(SHAPE)
    noise = start_noise(SHAPE, 5)
    clean = euler_forward(lambda x, t, text: constant, noise, FlowEuler(25, 3.0))
    torch.testing.assert_close(clean, noise - constant)
    torch.testing.assert_close(invert(lambda x, t, text: constant, clean, None, FlowEuler(25, 3.0)), noise)


def test_each_step_back_begins_where_it_is():
    """A velocity that depends on the level alone is taken at the lower end of a step."""
    scheduler = FlowEuler(6, 3.0)
    sigmas = scheduler.sigmas.double()
    seen = []

    def velocity(x, timestep, text):
        seen.append(timestep.item())
        return torch.ones_like(x) * (timestep / 1000) ** 2

    got = invert(velocity, torch.zeros(SHAPE), None, scheduler)
    expected = sum((sigmas[i] - sigmas[i + 1]) * sigmas[i + 1] ** 2 for i in range(6))
    assert seen == pytest.approx((1000 * sigmas[1:]).flip(0).tolist(), abs=1e-3)
    torch.testing.assert_close(got, torch.full(SHAPE, expected.item()), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_more_steps_come_nearer(wan):
    """On a random transformer, from noise to latents and back."""
    noise, text = start_noise((1, 16, 3, 8, 12), 4), encode_prompts(wan, [""], torch.device("cpu"))[0]
    errors = []
    for steps in (5, 20):
        scheduler = FlowEuler(steps, 3.0)
        latents = denoise(wan.dit, noise, scheduler, text, text, 1.0)
        errors.append((invert(wan.dit, latents, text, scheduler) - noise).norm() / noise.norm())
    assert errors[1] < 0.4 * errors[0]


# The search, where frame t of a video carries the noise of latent frame (t + 3) // 4, if its group is whole.


class Hidden:
    """What the search needs of a model."""

    dit = SimpleNamespace(config=SimpleNamespace(in_dim=16))

    def start_noise(self, shape, seed, key):
        return start_noise(shape, seed, key, "hidden")


def verifier(noise, frames, monkeypatch, original):
    """Frame numbers stand for pictures; a view's latent frame holds its noise if its four frames are one group's."""
    made = object.__new__(Verifier)
    made.wan, made.frames, made.original, made.calls = Hidden(), frames, original, []

    def estimate(view):
        made.calls.append(view)
        shown = view.of(frames)[:, 0, 0, 0].astype(int)  # their numbers in the original
        if view.mirrored != (frames[0, 0, 1, 0] == 1):
            return torch.randn(1, 16, (len(shown) + 3) // 4, *noise.shape[3:])
        groups = [shown[:1], *np.split(shown[1:], len(shown) // 4)]
        parts = []
        for group in groups:
            number = (group[-1] + 3) // 4
            whole = len({(n + 3) // 4 for n in group}) == 1 and len(group) == (1 if number == 0 else 4)
            parts.append(noise[:, :, number] if whole else torch.randn(noise[:, :, 0].shape))
        return torch.stack(parts, dim=2)

    monkeypatch.setattr(made, "estimate", estimate, raising=False)
    return made


@pytest.mark.parametrize(
    ("lost", "end", "view", "offset"),
    [
        (0, 33, (0, 0), 0),
        (0, 21, (0, 0), 0),
        (4, 33, (0, 0), 1),
        (1, 33, (3, 0), 1),
        (6, 33, (2, 0), 2),
        (3, 29, (1, 0), 1),
    ],
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_lost_frames_and_mirrors_are_searched(lost, end, view, offset, mirrored, monkeypatch):
    """Clips that begin and end anywhere in an original of 33 frames."""
    noise = start_noise((1, 16, 9, 4, 6), 2, "studio", "hidden")
    frames = np.zeros((end - lost, 32, 48, 3), np.uint8)
    frames[:, 0, 0, 0] = frames[:, 0, -1, 0] = np.arange(lost, end)
    frames[:, 0, 1, 0] = mirrored
    searcher = verifier(noise, frames, monkeypatch, (33, 32, 48))
    best, rate = searcher.best(range(4), "studio")
    assert best.seed == 2 and (best.view.skipped, best.offset) == (view[0], offset)
    assert best.view.mirrored == mirrored and rate < -6 and best.z > 10
    assert searcher.calls[-1] == best.view  # what settles it ends the search
    assert rate == pytest.approx(log10_rate(best.z, 4 * (2 * 8 + 6 * 7)))


def test_a_wrong_key_is_not_found(monkeypatch):
    noise = start_noise((1, 16, 9, 4, 6), 2, "studio", "hidden")
    frames = np.zeros((33, 32, 48, 3), np.uint8)
    frames[:, 0, 0, 0] = frames[:, 0, -1, 0] = np.arange(33)
    searcher = verifier(noise, frames, monkeypatch, (33, 32, 48))
    best, rate = searcher.best(range(4), "another")
    assert rate > -2 and len(searcher.calls) == 8


# The program.


def test_claims_are_read_and_checked(tmp_path):
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    label = {"seed": 7, "config": {"key": "studio", "steps": 2}, "clip": {"frames": 5, "height": 32, "width": 48}}
    clip = write_video(tmp_path / "a.webp", frames, 16, label)
    assert read_claim(clip) == {"seed": 7, "key": "studio", "frames": 5, "height": 32, "width": 48}
    for label in ({}, {"seed": "7"}, {"seed": True}, {"seed": 2**64}, {"seed": 1, "config": [3]}, [1]):
        assert read_claim(write_video(tmp_path / "b.webp", frames, 16, label)) == {}
    for seed in (-(2**63), -1, 2**64 - 1):  # all that a run takes
        assert read_claim(write_video(tmp_path / "b.webp", frames, 16, {"seed": seed})) == {"seed": seed}
    assert read_claim(write_video(tmp_path / "b.webp", frames, 16, {"seed": 1, "frames": 10**9})) == {"seed": 1}
    own = {"seed": 1, "key": "mine"}
    if is_installed():
        own["key"] = "a=b;\n#"  # which ffmpeg writes behind backslashes
        assert read_claim(write_video(tmp_path / "b.mp4", frames, 16, own)) == own
        (tmp_path / "b.mp4").unlink()
    (tmp_path / "run.json").write_text(json.dumps({"seed": 3}))
    assert read_claim(tmp_path / "b.mp4") == {"seed": 3}
    (tmp_path / "run.json").write_text("[" * 100_000)
    assert read_claim(tmp_path / "b.mp4") == {}


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [
        (9, 16384, 16384),  # a file of a few kilobytes would take gigabytes
        (9, 16, 2**24),
        (13, 4080, 4080),
        (1048573, 32, 48),  # as many offsets
        (8, 32, 48),
        (9, 33, 48),
    ],
)
def test_a_claim_may_not_ask_for_much_more_than_the_clip_has(frames, height, width, tmp_path, monkeypatch):
    """Else it counts as of the clip's own size. It may have had 16 times the frames and 4 times the pixels."""
    own = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8)
    label = {"seed": 1, "clip": {"frames": frames, "height": height, "width": width}}
    clip = write_video(tmp_path / "a.webp", own, 16, label)
    shapes = []

    class Seen(Verifier):
        def __init__(self, wan, frames, original, device):
            shapes.append((frames.shape, original))
            super().__init__(wan, frames, original, device)

        def best(self, *_):
            return Match(1, AS_IT_IS, 0, 0.5, 0.0), 0.0

    monkeypatch.setattr(verify_module, "Verifier", Seen)
    assert main([str(clip), *CPU]) == 1
    assert shapes == [((9, 32, 48, 3), (9, 32, 48))]
    assert believable_size({"frames": 141, "height": 64, "width": 96}, own.shape)["frames"] == 141
    assert believable_size({"frames": 145, "height": 64, "width": 96}, own.shape) == {}
    assert believable_size({"frames": 9, "height": 64, "width": 112}, own.shape) == {}
    assert believable_size({"frames": 9, "height": 32}, own.shape) == {}


@pytest.mark.parametrize("flags", ["--frames 1000000001", "--frames 20001", "--height 100000000 --width 16"])
def test_sizes_that_nothing_holds_are_refused_at_once(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify_module, "read_video", lambda *_, **__: pytest.fail("the clip was read"))
    assert main([str(tmp_path / "a.webp"), *flags.split(), *CPU]) == 2
    assert "must be at most" in capsys.readouterr().err


def test_a_long_original_of_small_frames_is_no_error(tmp_path):
    """Its size is checked with the clip's own height and width, not with a large clip's."""
    clip = write_video(tmp_path / "a.webp", np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8), 16)
    args = parser().parse_args([str(clip), "--frames", "9997"])
    assert read_clip(clip, args, {})[1] == (9997, 32, 48)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A small clip of the tiny model with a key, and the file's metadata."""
    out = tmp_path_factory.mktemp("marked") / "clip.webp"
    flags = "--height 96 --width 96 --frames 17 --steps 12 --sampler euler --seed 5 --key studio --device cpu"
    words = [
        "--model",
        str(CHECKPOINT),
        "--prompt",
        "A picture of a red ring against the night sky.",
        "--out",
        str(out),
    ]
    assert run(generate_program, [*words, *flags.split(), "--dtype", "float32"]) == 0
    return out


def test_the_tiny_models_clip_is_found(marked, capsys):
    """By its own metadata, which gives seed, key and size; compressed as a WebP."""
    assert main([str(marked), *CPU]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("17 frames of 96x96, tiny on cpu, seed 5, key 'studio'")
    assert second.startswith("this noise: seed 5, agreement 5") and "(from its frame 0, 0 latent frames" in second


@pytest.mark.skipif(not is_installed(), reason="needs ffmpeg")
def test_the_mark_survives_h264(marked, tmp_path, capsys):
    """The settings lie in the mp4's comment; without them, seed and key are given."""
    frames = read_video(marked)
    plain = write_video(tmp_path / "plain.mp4", frames, 16)
    assert main([str(plain), "--seed", "5", "--key", "studio", "--quick", *CPU]) == 0
    assert main([str(plain), "--seed", "6", "--key", "studio", "--quick", *CPU]) == 1
    capsys.readouterr()
    described = write_video(tmp_path / "described.mp4", frames, 16, {"seed": 5, "key": "studio"})
    assert main([str(described), "--quick", *CPU]) == 0
    assert "seed 5, key 'studio'" in capsys.readouterr().out


def test_without_metadata_a_search_finds_the_seed_but_not_another_key(marked, tmp_path, capsys):
    with Image.open(marked) as file:
        assert file.n_frames == 17
    copy = write_video(tmp_path / "copy.webp", read_video(marked), 16)
    assert main([str(copy), "--seeds", "8", "--key", "studio", "--quick", *CPU]) == 0
    assert "this noise: seed 5" in capsys.readouterr().out
    assert main([str(copy), "--seeds", "8", "--quick", *CPU]) == 1
    assert "not found: seed" in capsys.readouterr().out


def test_errors_and_flags(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path / "none.webp"), *CPU]) == 2 and "no clip at" in capsys.readouterr().err
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8)
    clip = write_video(tmp_path / "a.webp", frames, 16)
    with pytest.raises(SystemExit) as stopped:
        main([str(clip), "--seed", "9" * 20, *CPU])
    assert stopped.value.code == 2 and "needs a seed" in capsys.readouterr().err
    (tmp_path / "run.json").write_bytes(b'{"seed": "\xe9"}')  # another encoding: no claim, and no error
    assert read_claim(clip) == {}
    wrong = (["--height", "32"], ["--frames", "8"], ["--seeds", "0"], ["--frames", "1"])
    for flags in (*wrong, ["--seeds", "9" * 30]):
        assert main([str(clip), *flags, *CPU]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
    seen = {}

    class Spy(Verifier):
        def __init__(self, wan, frames, original, device):
            seen.update(original=original, shape=frames.shape)

        def best(self, seeds, key, views=VIEWS):
            seen.update(seeds=list(seeds), key=key, views=views)
            return match(torch.ones(SHAPE), torch.ones(SHAPE), 0, AS_IT_IS, 0), -9.0

    monkeypatch.setattr(verify_module, "Verifier", Spy)
    flags = ["--frames", "13", "--height", "64", "--width", "80", "--seed", "4", "--key", "k", "--quick"]
    assert main([str(clip), *flags, *CPU]) == 0
    assert seen == {"original": (13, 64, 80), "shape": (9, 64, 80, 3), "seeds": [4], "key": "k", "views": [AS_IT_IS]}
    assert main([str(clip), "--seeds", "3", *CPU]) == 0
    assert seen["seeds"] == [0, 1, 2] and seen["key"] == "" and seen["original"][0] == frames_of(3)
