"""Every saving by its formula, or beside a run that does the same by other means; what each costs, counted."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastvmt
from fastvmt import FastVMT, MotionConfig, Target, transfer
from losses import window_loss
from skip_optim import optimize
from wan_mini.attention import OneProcess
from wan_mini.config import T2V_1_3B, DiTConfig
from wan_mini.device.flops import forward_flops
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.pipeline import denoise
from wan_mini.runs.journal import Journal
from wan_mini.savings import (
    SavedVelocity,
    SavingsConfig,
    flow_flops,
    guidance_cost,
    pair_count,
    passes_at,
    rates_of,
    sampling_passes,
    subset_flops,
    thinned,
    token_subset,
)
from wan_mini.scheduler import FlowEuler
from wan_mini.tiny.world import make_clip
from window import dense_amf, frame_pairs, windowed_amf

SMALL = MotionConfig(steps=4, shift=3.0, cfg=4.0, negative="", guidance_fraction=1.0, optim_steps=4, lr=(0.02, 0.005))
SMALL = replace(SMALL, tau=3.0, tile=(2, 3), window=3)
DIT = DiTConfig(dim=96, ffn_dim=200, num_heads=2, num_layers=4, freq_dim=64, text_dim=24, text_len=8)
GRID = (21, 30, 52)  # of 81 frames of 480x832


class Flow:
    """Stands for a transformer: the velocity depends on the text alone, unless it bends with the latents."""

    ranks = OneProcess()

    def __init__(self, bend=0.0):
        self.bend = bend
        self.calls = []

    def __call__(self, latents, timestep, text):
        self.calls.append((round(timestep.item(), 3), text.item()))
        return text + self.bend * latents


def sample(config, dit, latents):
    """Latents of a run, and the passes of each step."""
    passes = []
    scheduler = FlowEuler(config.steps, config.shift)
    velocity_of = SavedVelocity(config, {}, passes)
    texts = torch.tensor(3.0), torch.tensor(1.0)
    return denoise(dit, latents, scheduler, *texts, config.cfg, velocity_of=velocity_of), passes


@pytest.fixture(scope="module")
def clip():
    return make_clip(0).frames[:13, ::2, ::2].copy()  # four latent frames of 4x6 tokens


@pytest.fixture(scope="module")
def guide(wan, clip):
    """A function of options: FastVMT on the random model."""
    torch.manual_seed(1)
    reference = torch.randn(1, 16, 4, 8, 12)
    noise = torch.randn(1, 16, 4, 8, 12)
    text = torch.randn(1, 5, wan.dit.config.text_dim)
    return lambda **options: FastVMT(wan.dit, reference, noise, text, 0 * text, replace(SMALL, **options))


# Classifier-free guidance in an interval.


def test_outside_the_interval_the_prompt_alone_is_asked():
    """By hand: the velocity at the levels 1, 0.5 and 0.25 is 3, at 0.75 it is 1 + 4 (3 - 1) = 9."""
    config = SavingsConfig(steps=4, shift=1.0, cfg=4.0, cfg_interval=(0.6, 0.8))
    dit = Flow()
    got, passes = sample(config, dit, torch.zeros(1))
    assert got.item() == pytest.approx(-0.25 * (3 + 9 + 3 + 3))
    assert passes == [1, 2, 1, 1] and sampling_passes(config) == 5
    assert dit.calls == [(1000, 3), (750, 3), (750, 1), (500, 3), (250, 3)]
    assert [passes_at(config, t) for t in (800.0, 600.0, 599.0, 801.0)] == [2, 2, 1, 1]  # the ends belong to it
    assert sampling_passes(replace(config, cfg=1.0)) == 4 and sampling_passes(replace(config, cfg_interval=(0, 1))) == 8


# Caching.


def test_a_cached_velocity_is_a_longer_step():
    """Euler with every second velocity reused is Euler on every second level."""
    dit, start = Flow(bend=0.5), torch.full((2, 3), 10.0)
    config = SavingsConfig(steps=4, shift=1.0, cfg=1.0, cache=1e-9)
    got = {}
    for cache in (0.0, 0.3):
        got[cache], passes = sample(replace(config, cache=cache), dit, start)
        assert passes == ([1, 1, 1, 1] if cache == 0 else [1, 0, 1, 0])
    x = start
    for _ in range(2):
        x = x - 0.5 * (3 + 0.5 * x)
    torch.testing.assert_close(got[0.3], x)
    assert (got[0.0] - x).abs().max() > 0.05


def test_the_cache_adds_up_relative_changes():
    """Latents before the steps are 3, 2.25, 1.5, 0.75: changes of 1/4, 1/3, 1/2, sums of 0.25, 0.583, 1.083."""
    got, passes = sample(SavingsConfig(steps=4, shift=1.0, cfg=1.0, cache=1.2), Flow(), torch.full((5,), 3.0))
    assert passes == [1, 0, 0, 0] and got[0].item() == pytest.approx(0)
    for cache, expected in ((0.25, [1, 1, 1, 1]), (0.26, [1, 0, 1, 1]), (0.6, [1, 0, 0, 1])):
        assert (
            sample(SavingsConfig(steps=4, shift=1.0, cfg=1.0, cache=cache), Flow(), torch.full((5,), 3.0))[1]
            == expected
        )


def test_a_constant_velocity_is_cached_exactly():
    config = SavingsConfig(steps=7, shift=3.0, cfg=4.0)
    start = torch.randn(4, 5)
    (plain, all_passes), (cached, passes) = (sample(replace(config, cache=c), Flow(), start) for c in (0.0, 100.0))
    torch.testing.assert_close(cached, plain, rtol=1e-6, atol=1e-6)
    assert (sum(all_passes), sum(passes)) == (14, 2)


# Fewer guided steps, equal travel.


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7])
def test_fewer_guided_steps_move_latents_as_far(every):
    rates = rates_of((0.03, 0.01), 7, every)
    travel = 0.0
    for _ in range(0, 7, every):
        for update in range(10):
            travel += rates[0] + (rates[1] - rates[0]) * update / 9
    assert travel == pytest.approx(7 * 10 * 0.02)
    assert rates_of((0.03, 0.01), 7, 1) == (0.03, 0.01)


def test_every_second_step_is_guided(guide):
    g = guide(guide_every=2, gradient_every=1)
    for index in range(4):
        x = torch.randn(1, 16, 4, 8, 12)
        moved = g.before_step(index, x, torch.tensor(0.8), torch.tensor(800.0))
        assert torch.equal(moved, x) == (index % 2 == 1)
    assert len(g.losses) == 2 and g.gradients == [2, 2]
    one = guide(lr=(0.04, 0.01))  # twice the rates
    x = torch.randn(1, 16, 4, 8, 12)
    at = torch.tensor(0.8), torch.tensor(800.0)
    assert torch.equal(one.before_step(0, x, *at), guide(guide_every=2).before_step(0, x, *at))


# Gradients that serve several steps.


def test_a_given_gradient_moves_each_element_by_the_rates():
    """AdamW with one gradient g: each update is rate x sign(g), so all are the sum of the rates."""
    x, gradient = torch.zeros(50), torch.randn(50)
    got, report = optimize(x, None, steps=10, lr=(0.003, 0.002), gradient=gradient)
    torch.testing.assert_close(got, -0.025 * gradient.sign(), rtol=1e-4, atol=1e-7)
    assert report.gradients == 0 and report.losses == [] and report.gradient is gradient


def test_a_gradient_of_the_step_before_is_reused(guide):
    g = guide(gradient_every=2, interval=2)
    at = torch.tensor(0.8), torch.tensor(800.0)
    x = g.before_step(0, torch.randn(1, 16, 4, 8, 12), *at)
    got = g.before_step(1, x, *at)
    torch.testing.assert_close(x - got, 0.05 * g.state["gradient"].sign(), rtol=1e-3, atol=2e-4)
    assert g.gradients == [2] and len(g.losses) == 1
    g.before_step(2, got, *at)
    assert g.gradients == [2, 2]


def test_a_linear_loss_makes_reuse_exact():
    weights = torch.randn(20)
    x, first = optimize(torch.zeros(20), lambda x: (weights * x).sum(), steps=3, interval=1)
    again, _ = optimize(x, lambda x: (weights * x).sum(), steps=3, interval=1)
    assert torch.equal(optimize(x, None, steps=3, gradient=first.gradient)[0], again)


# Fewer anchors.


@pytest.mark.parametrize("every", [1, 2, 3, 6, 9])
def test_fewer_anchors(every):
    """Pairs by their definition, and the window loss by Eq. 7's double sum over the anchors there are."""
    pairs = frame_pairs(7, 3, every)
    assert sorted(pairs) == [(i, j) for i in range(0, 7, every) for j in range(i + 1, min(i + 4, 7))]
    assert len(pairs) == pair_count(7, 3, every)
    k = torch.randn(1, 7 * 6, 2, 4, dtype=torch.float64)
    windows = torch.stack([torch.stack([torch.randperm(6)[:3] for _ in range(2)]) for _ in pairs])
    frames = k[0].unflatten(0, (7, 6))
    expected = 0.0
    for i in range(0, 7, every):
        targets = [j for a, j in pairs if a == i]
        for j in sorted(targets)[1:]:
            now, before = (frames[f][windows[pairs.index((i, f))]].mean(1) for f in (j, j - 1))  # (tiles,M,D)
            expected += (now - before).square().sum((1, 2)).mean() / 2 / (len(targets) - 1)
    expected /= math.ceil(7 / every)
    torch.testing.assert_close(window_loss(k, (7, 2, 3), pairs, windows, every), torch.as_tensor(expected))


def test_noise_levels_in_the_wrong_order_are_refused():
    """Else no step would be between them, and classifier-free guidance be off without a word."""
    with pytest.raises(UserError, match="cfg_interval must be the lower noise level"):
        MotionConfig(cfg_interval=(1.0, 0.5))


@pytest.mark.parametrize("every", [2, 3])
def test_the_guidance_has_the_anchors_of_its_options(guide, every):
    """Both losses of a run with fewer anchors are those of its pairs: with one anchor, too."""
    guidance = guide(anchor_every=every)
    assert guidance.pairs == frame_pairs(4, SMALL.span, every)
    q, k = torch.randn(2, 1, 4 * 24, 4, 16)
    flow, windows = guidance.flow(q, k, None)
    _, window = guidance.losses_of(q, k, Target(flow, None))
    assert window == window_loss(k, (4, 4, 6), guidance.pairs, windows, every) > 0


def test_a_missing_anchor_is_refused():
    pairs = [pair for pair in frame_pairs(7, 3) if pair[0] != 2]
    with pytest.raises(ValueError, match="needs all pairs of 7 frames"):
        window_loss(torch.randn(1, 42, 2, 4), (7, 2, 3), pairs, torch.zeros(len(pairs), 2, 3, dtype=torch.long))


# Some of the tokens.


def test_frames_keep_their_positions():
    """The blocks see latent frames 1, 3, 5 of 6 as a clip of three frames at the times 1, 3, 5."""
    model = WanDiT(DIT).requires_grad_(False)
    latents, text, t = torch.randn(1, 16, 6, 8, 12), torch.randn(1, 8, 24), torch.tensor([700.0])
    subset = token_subset((6, 4, 6), 2, 1, phase=1)
    assert (subset.grid, subset.starts) == ((3, 4, 6), (1, 0, 0))
    for got, expected in zip(
        model(latents, t, text, qk_block=2, tokens=subset.numbers),
        model(latents[:, :, 1::2], t, text, qk_block=2, times=(1, 3, 5)),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    whole = token_subset((6, 4, 6), 1, 1, phase=3)
    assert whole.numbers is None and whole.grid == (6, 4, 6)
    for got, expected in zip(
        model(latents, t, text, qk_block=2, tokens=torch.arange(6 * 4 * 6)), model(latents, t, text, qk_block=2)
    ):
        assert torch.equal(got, expected)


def test_rows_and_columns_keep_their_positions():
    """A token's first query depends on its patch and its position alone: the same as among all tokens."""
    model = WanDiT(DIT).requires_grad_(False)
    latents, text, t = torch.randn(1, 16, 3, 8, 12), torch.randn(1, 8, 24), torch.tensor([700.0])
    numbers = torch.arange(3 * 4 * 6).reshape(3, 4, 6)
    seen = []
    for phase in range(4):
        subset = token_subset((3, 4, 6), 1, 2, phase)
        _, row, column = subset.starts
        assert torch.equal(subset.numbers, numbers[:, row::2, column::2].flatten()) and subset.grid == (3, 2, 3)
        some, all_of_them = (model(latents, t, text, qk_block=0, tokens=n)[0] for n in (subset.numbers, None))
        torch.testing.assert_close(some, all_of_them[:, subset.numbers], rtol=1e-5, atol=1e-5)
        seen += subset.numbers.tolist()
    assert sorted(seen) == list(range(72))  # each token once


def test_subsets_take_turns_and_keep_two_frames():
    assert [token_subset((4, 4, 4), 2, 2, phase).starts for phase in range(9)] == [
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 0, 0)
    ]  # fmt: skip
    assert [token_subset((3, 4, 4), 2, 1, phase).grid[0] for phase in range(2)] == [2, 2]
    with pytest.raises(UserError, match=r"leave no motion in a grid of \(2, 4, 4\), got 2 and 1"):
        token_subset((2, 4, 4), 2, 1, 0)
    c = thinned(MotionConfig(tile=(3, 4), window=21, span=5, frames_every=2, tokens_every=2))
    assert (c.tile, c.window, c.span) == ((2, 2), 11, 3)


def test_only_tokens_that_are_seen_are_moved(guide):
    """In the second guided step, those of the odd frames; the target is that of the same tokens."""
    g = guide(frames_every=2, reference="clean")
    at = torch.tensor(0.8), torch.tensor(800.0)
    for index, odd in ((0, False), (1, True), (2, False)):
        x = torch.randn(1, 16, 4, 8, 12)
        moved = (g.before_step(index, x, *at) != x).any(-1).any(-1).any(1)[0]  # (F,)
        assert moved.tolist() == [not odd, odd, not odd, odd]
    assert len(g.clean) == 2
    x = g.reference.clone()
    q, k = g.dit(x[:, :, ::2], torch.zeros(1), g.empty_text, qk_block=g.block, times=(0, 2))
    torch.testing.assert_close(g.clean_target.flow, g.flow(q, k, g.clean_centers)[0], rtol=1e-3, atol=1e-4)


# Early stopping.


def test_a_loss_that_is_low_enough_ends_the_loop():
    """As if there were fewer updates, at a constant rate: to the bit."""
    rate = (0.1, 0.1)
    bowl = {"loss_fn": lambda x: x.square().sum(), "interval": 2, "lr": rate}
    full, report = optimize(torch.ones(3), steps=10, **bowl)
    asked = []
    stopped, short = optimize(
        torch.ones(3), steps=10, stop=lambda losses: asked.append(losses[-1]) or losses[-1] < 1.2, **bowl
    )
    first = next(n for n, loss in enumerate(report.losses) if loss < 1.2)
    assert first == 2 and short.losses == report.losses[:3] and short.gradients == 2 and report.gradients == 5
    assert asked == report.losses[1:3]  # not after the first, and no more
    assert torch.equal(stopped, optimize(torch.ones(3), steps=4, **bowl)[0]) and not torch.equal(stopped, full)


def test_a_guided_step_ends_at_its_share_of_the_loss(guide):
    at = torch.tensor(0.8), torch.tensor(800.0)
    torch.manual_seed(2)
    x = torch.randn(1, 16, 4, 8, 12)
    for share, evaluated, gradients in ((0.0, 4, 4), (1e-9, 4, 4), (1.0, 2, 1)):
        g = guide(stop_loss=share, interval=1)
        g.before_step(0, x, *at)
        assert (len(g.losses[0]), g.gradients) == (evaluated, [gradients])
        assert share < 1 or g.losses[0][1] < g.losses[0][0]
    half = guide(stop_loss=0.5)
    assert [half.is_enough([4.0, *more]) for more in ((2.1,), (2.0,), (1.0, 2.1))] == [False, True, False]


# Costs.


def counted(call):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_operations_of_some_tokens():
    """A forward is counted to the last operation; of a gradient, see test_flops.py, the patches' part is new."""
    model = WanDiT(DIT).requires_grad_(False)
    latents, text, t = torch.randn(1, 16, 4, 8, 12), torch.randn(1, 8, 24), torch.tensor([700.0])
    subset = token_subset((4, 4, 6), 2, 2, 0)
    kept = len(subset.numbers)
    forward, gradient = subset_flops(DIT, 96, kept, 2)
    assert kept == 12 and counted(lambda: model(latents, t, text, qk_block=2, tokens=subset.numbers)) == forward
    alone = subset_flops(DIT, 12, 12, 2)
    assert gradient - alone[1] == 2 * (forward - alone[0]) == 2 * 2 * 84 * 64 * 96


@pytest.mark.parametrize(("amf", "products"), [("windowed", 3), ("dense", 4)])
def test_operations_of_a_motion_flow(amf, products):
    """Dense flow makes its logits again in the backward pass; a window keeps its softmax."""
    grid, pairs = (3, 4, 6), frame_pairs(3, 2)
    logits = flow_flops(DIT, grid, 2, 1)
    one = replace(SMALL, amf=amf, span=2, steps=1, optim_steps=1, interval=1)
    cost = guidance_cost(one, DIT, 2, grid)
    assert cost.gradients == 1 and cost.flow == (1 + products) * logits  # the reference's, and one gradient
    q, k = (torch.randn(1, 72, DIT.num_heads, DIT.dim // DIT.num_heads, requires_grad=True) for _ in range(2))
    flow = {"dense": dense_amf, "windowed": partial(windowed_amf, tile=(2, 2), window=2)}[amf]
    centers = {"dense": {}, "windowed": {"centers": torch.full((3, 6, 2), 2.0)}}[amf]

    def gradient():
        result = flow(q, k, grid, pairs, **centers)
        (result if amf == "dense" else result[0]).square().sum().backward()

    keys = {"dense": 24, "windowed": 4}[amf]
    means = 2 * len(pairs) * 24 * keys * 2  # softmax x coordinates: rows and columns
    assert counted(gradient) == products * logits + 2 * means  # those: forward, and once backward


def test_what_a_run_reports_is_what_was_planned(wan, clip):
    """The operations of what happened are those of --dry-run, where nothing depends on the data."""
    whole = forward_flops(wan.dit.config, 96)
    cases = [({"guide_every": 2}, 4), ({"gradient_every": 3, "interval": 1}, 8), ({"frames_every": 2}, 8)]
    for options, gradients in cases:
        config = replace(SMALL, **options)
        report = transfer(wan, clip, "a ball", config, seed=1).report
        cost = guidance_cost(config, wan.dit.config, 2, (4, 4, 6))
        assert report["flops"] == {"guidance": cost.flops, "flow": cost.flow, "denoising": 8 * whole}
        assert report["gradients"] == cost.gradients == gradients and report["passes"] == [2, 2, 2, 2]
    report = transfer(wan, clip, "a ball", replace(SMALL, amf="none", cache=9.0, cfg_interval=(0, 0.5)), seed=1).report
    assert report["passes"] == [1, 0, 0, 0] and report["flops"] == {"guidance": 0, "flow": 0, "denoising": whole}


def total(config, dit, grid):
    block = (dit.num_layers - 1) // 2 if config.block is None else config.block
    cost = guidance_cost(config, dit, block, grid)
    return cost.flops + cost.flow + sampling_passes(config) * forward_flops(dit, math.prod(grid))


def test_each_saving_lowers_the_count():
    default = total(MotionConfig(), T2V_1_3B, GRID)
    assert default / 1e15 == pytest.approx(45.91, abs=0.005)
    assert total(replace(MotionConfig(), amf="none"), T2V_1_3B, GRID) / 1e15 == pytest.approx(28.3, abs=0.01)
    options = {"cfg_interval": (0.9, 1.0), "guide_every": 2, "gradient_every": 2, "frames_every": 2, "tokens_every": 2}
    for name, value in (options | {"anchor_every": 2, "block": 5, "span": 1}).items():
        assert total(replace(MotionConfig(), **{name: value}), T2V_1_3B, GRID) < default, name


def test_dry_run_lines():
    with torch.device("meta"):
        dit = WanDiT(T2V_1_3B)
    fewer = {"cfg_interval": (0.9, 1.0), "guide_every": 2, "frames_every": 2, "interval": 5}
    plain, saved = (fastvmt.costs(replace(MotionConfig(), **o), dit, GRID) for o in ({}, fewer))
    assert plain[1:] == [
        "             40 gradients for 100 latent updates, 17,536.7 TFLOP",
        "             71.9 TFLOP for their motion flow",
    ]
    assert (
        "guidance     5 of 50 steps, block 14 of 30, 19 frame pairs" in saved[0] and "10 gradients for 50" in saved[1]
    )


# All together.


class Killed(Exception):  # noqa: N818 (it is no error)
    """Ends a run."""


@pytest.mark.parametrize("options", [{"cache": 0.8}, {"gradient_every": 3}, {"frames_every": 2, "guide_every": 2}])
def test_a_run_that_goes_on_is_one_that_did_not_stop(wan, clip, tmp_path, options):
    """The velocity, the latents and the gradient that are reused are in the journal."""
    config = replace(SMALL, **options)
    whole = transfer(wan, clip, "a ball", config, seed=1)
    steps = []

    class Stops(Journal):
        def keep(self, step, *rest):
            super().keep(step, *rest)
            steps.append(step)
            if steps == [1, 2]:
                raise Killed

    run = partial(transfer, wan, clip, "a ball", config, seed=1)
    with pytest.raises(Killed):
        run(journal=Stops(tmp_path / "state.safetensors", {}, {}, every=0))
    again = run(journal=Stops(tmp_path / "state.safetensors", {}, {}, every=0))
    assert steps == [1, 2, 3, 4]
    assert torch.equal(again.latents, whole.latents) and again.report == whole.report


def test_pairs_of_a_report_are_those_of_the_first_guided_step(wan):
    """Of five latent frames, every second are three or two: where a run is resumed must not be seen."""
    latents, text = torch.randn(1, 16, 5, 8, 12), torch.randn(1, 64, 16)
    guidance = FastVMT(wan.dit, latents, latents, text, text, replace(SMALL, frames_every=2))
    guidance.choose_tokens(1)
    assert len(guidance.pairs) == 1 and guidance.report()["pairs"] == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [("cfg_interval", (0.0, 1.5)), ("cache", -1.0), ("guide_every", 0), ("gradient_every", 0), ("stop_loss", 2.0)],
)
def test_options_out_of_range(name, value):
    with pytest.raises(UserError, match=f"{name} must be at"):
        replace(MotionConfig(), **{name: value})
