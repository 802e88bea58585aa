"""The training loop: losses fall, runs repeat to the bit and go on after a stop, and only what should be is trained."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from wan_mini.config import DiTConfig
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.lora import lora_on
from wan_mini.peers import fit as fit_module
from wan_mini.peers.fit import (
    Fit,
    FitConfig,
    Pass,
    Stage,
    denoising_loss,
    draw_sigma,
    gradients_of,
    loss_by_level,
    passes_of,
)
from wan_mini.scheduler import shift_sigma

CONFIG = DiTConfig(dim=48, ffn_dim=96, num_heads=4, num_layers=2, freq_dim=32, text_dim=16, text_len=8)
ALL = [torch.ones(4, dtype=torch.bool)] * 2


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(2)
    return WanDiT(CONFIG).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def text():
    return torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def clip():
    return torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(4))


def stages_on(dit, clip, steps=(3, 4)):
    first, second = (lora_on(dit, ALL, rank=4, seed=seed) for seed in (1, 2))
    still = Pass("still", [clip[:, :, i : i + 1] for i in range(3)], first)
    moving = Pass("moving", [clip], second, (first,), times=(0.0, 1.5, 3.0))
    return [Stage("one", [still], steps[0], 1e-2, 0.1), Stage("two", [moving], steps[1], 1e-2, 0.5)]


def weights(stages):
    return [weight.clone() for stage in stages for part in stage.parts() for weight in part.state_dict().values()]


def train(dit, clip, text, *, steps=(3, 4), **options):
    stages = stages_on(dit, clip, steps)
    log = Fit(stages, seed=5, **options).run(dit, text, shift=3.0)
    return weights(stages), log


def test_the_loss_falls_by_half_on_one_batch(dit, clip, text):
    """One noise level and one noise, 50 steps."""
    adapters = lora_on(dit, ALL, rank=16)
    step = Pass("one", [clip[..., :2]], adapters)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=3e-2)
    losses = []
    for _ in range(50):
        entry = gradients_of(dit, step, text, np.random.default_rng(0), 3.0, "none")
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(entry["loss"]))
    assert losses[-1] < losses[0] / 2


def test_a_pass_with_a_share_is_left_out_at_random(dit, clip, text):
    """And its part is then not beside the others either: MotionDirector scales it to 0 in such a step."""
    still, moving = (stage.passes[0] for stage in stages_on(dit, clip))
    stage = Stage("both", [replace(still, share=0.8), moving], 1, 1e-2)
    rng = np.random.default_rng(0)
    steps = [passes_of(stage, rng) for _ in range(1000)]
    whole = [step for step in steps if len(step) == 2]
    assert len(whole) == pytest.approx(800, abs=40)
    assert all(step[1].frozen == (still.trained,) for step in whole)
    assert all(step[0].name == "moving" and step[0].frozen == () for step in steps if len(step) == 1)
    before = rng.bit_generator.state
    assert [step.name for step in passes_of(Stage("both", [still, moving], 1, 1e-2), rng)] == ["still", "moving"]
    assert rng.bit_generator.state == before  # where nothing is left out, nothing is drawn


def test_one_seed_gives_the_same_adapters_to_the_bit(dit, clip, text):
    (one, log), (again, _) = train(dit, clip, text), train(dit, clip, text)
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert [entry["pass"] for entry in log] == ["still"] * 3 + ["moving"] * 4
    other = stages_on(dit, clip)
    Fit(other, seed=6).run(dit, text, shift=3.0)
    assert not all(torch.equal(a, b) for a, b in zip(one, weights(other)))


def test_a_step_is_what_it_says(dit, clip, text, monkeypatch):
    """What is drawn, what the model is asked and at which positions; stages in order, each with its own rates."""
    calls = []
    forward = dit.forward

    def watch(latents, timestep, prompt, **options):
        calls.append((latents, timestep, options))
        return forward(latents, timestep, prompt, **options)

    monkeypatch.setattr(dit, "forward", watch)
    _, log = train(dit, clip, text, steps=(1, 1))
    for number, ((latents, timestep, options), entry) in enumerate(zip(calls, log)):
        rng = np.random.default_rng([5, number, 0])
        clips = [[clip[:, :, i : i + 1] for i in range(3)], [clip]][number]
        z = clips[int(rng.integers(len(clips)))]
        sigma = float(shift_sigma(torch.tensor(rng.uniform(), dtype=torch.float64), 3.0))
        noise = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32))
        assert entry["sigma"] == sigma and timestep.item() == pytest.approx(1000 * sigma)
        torch.testing.assert_close(latents, (1 - sigma) * z + sigma * noise)
        assert options["times"] == [None, (0.0, 1.5, 3.0)][number]
        if number == 0:  # adapters change nothing yet
            v = forward(latents, timestep, text)
            assert entry["loss"] == pytest.approx((v - (noise - z)).square().mean().item(), rel=1e-5)


def test_frozen_parts_act_and_stay(dit, clip, text):
    stages = stages_on(dit, clip)
    still, moving = stages[0].passes[0], stages[1].passes[0]
    for lora in still.trained.values():
        torch.nn.init.normal_(lora.B, std=0.5)
    before = weights(stages[:1])
    rng = partial(np.random.default_rng, 0)
    loss = gradients_of(dit, moving, text, rng(), 3.0, "none")["loss"]
    assert all(weight.grad is None for weight in [*dit.parameters(), *still.trained.parameters()])
    assert any(weight.grad.any() for weight in moving.trained.parameters())
    Fit(stages[1:], seed=5).run(dit, text, shift=3.0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(stages[:1])))
    alone = Pass("alone", [clip], lora_on(dit, ALL, rank=4, seed=2), times=(0.0, 1.5, 3.0))
    assert gradients_of(dit, alone, text, rng(), 3.0, "none")["loss"] != loss


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(dit, clip, text, tmp_path, monkeypatch, stop):
    whole, log = train(dit, clip, text)
    monkeypatch.setattr(fit_module, "SAVE_EVERY", 0.0)
    file, calls = tmp_path / "fits" / "state", []

    def loss(prediction):
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return denoising_loss(prediction)

    stages = stages_on(dit, clip)
    for stage in stages:
        object.__setattr__(stage.passes[0], "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        Fit(stages, seed=5, state=file, settings="a").run(dit, text, shift=3.0)
    with pytest.raises(UserError, match="was begun with other settings"):
        Fit(stages_on(dit, clip), seed=5, state=file, settings="b")
    again, whole_log = train(dit, clip, text, state=file, settings="a")
    assert all(torch.equal(a, b) for a, b in zip(whole, again)) and whole_log == log
    stages = stages_on(dit, clip)
    finished = Fit(stages, seed=5, state=file, settings="a")
    assert finished.log
    finished.finish()
    assert not file.exists()


def test_a_loss_that_is_not_finite_stops_at_its_step(dit, clip, text):
    stage = Stage(
        "one", [Pass("bad", [clip], lora_on(dit, ALL, rank=4), loss=lambda p: p.velocity.sum() * torch.nan)], 2, 1.0
    )
    with pytest.raises(FloatingPointError, match="loss of bad is not finite at step 1: lower fit_lr"):
        Fit([stage], seed=0).run(dit, text, shift=3.0)


def test_what_has_no_weights_is_left_out(dit, clip, text):
    none = lora_on(dit, [torch.zeros(4, dtype=torch.bool)] * 2, rank=4)
    stages = [Stage("empty", [Pass("empty", [clip], none)], 3, 1.0), *stages_on(dit, clip, (0, 1))]
    assert [entry["pass"] for entry in Fit(stages, seed=0).run(dit, text, shift=3.0)] == ["moving"]


def test_noise_levels():
    rng = np.random.default_rng(0)
    levels = [draw_sigma(rng, 12.0) for _ in range(2000)]
    assert min(levels) >= 0 and max(levels) <= 1
    assert np.mean(np.array(levels) > 12 / 13) == pytest.approx(0.5, abs=0.05)  # the median of shift s is s / (s + 1)


def test_losses_by_level():
    log = [{"pass": "a", "sigma": s, "loss": x} for s, x in ((0.05, 1.0), (0.07, 3.0), (1.0, 5.0), (0.95, 6.0))]
    table = loss_by_level([*log, {"pass": "b", "sigma": 0.5, "loss": 7.0}])
    assert table["a"]["first half"] == [2.0] + [None] * 9
    assert table["a"]["second half"] == [None] * 9 + [5.5]
    assert table["b"]["second half"][5] == 7.0


def test_options_are_checked():
    for name, value in (("fit_steps", (-1, 0)), ("fit_lr", (float("nan"), 1.0)), ("fit_shift", 0.0)):
        with pytest.raises(UserError, match=name):
            FitConfig(**{name: value})
