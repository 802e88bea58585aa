"""MotionDirector, MotionInversion and DeT: losses in closed form, and where their parts reach into the model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from wan_mini.config import DiTConfig
from wan_mini.device.offload import on_device
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.lora import attached
from wan_mini.peers import det, motiondirector, motioninversion
from wan_mini.peers.adaptation import training_options
from wan_mini.peers.det import DeTConfig, TemporalConv, TemporalConvs, tracked_loss, tracking_loss
from wan_mini.peers.fit import Fit, Prediction, denoising_loss, gradients_of
from wan_mini.peers.motiondirector import MotionDirectorConfig, debias, debiased_loss
from wan_mini.peers.motioninversion import Embeddings, MotionInversionConfig, at_length, differences

CONFIG = DiTConfig(dim=48, ffn_dim=96, num_heads=4, num_layers=2, freq_dim=32, text_dim=16, text_len=8)
GRID = (3, 2, 3)
FRAMES, SIZE, DIM = 3, 6, 48
T = torch.tensor([700.0])


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(5)
    return WanDiT(CONFIG).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def text():
    return torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def clips():
    whole = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(4))
    return {"whole": [whole], "temporal": [whole], "spatial": [whole[:, :, i : i + 1] for i in range(3)]}


class Anchor:
    """Stands for the random generator, and draws this anchor."""

    def __init__(self, anchor):
        self.anchor = anchor

    def integers(self, count):
        assert self.anchor < count
        return self.anchor


def prediction(velocity, target, anchor=0, sigma=0.5, noised=None):
    return Prediction(velocity, target, torch.zeros_like(target) if noised is None else noised, sigma, Anchor(anchor))


# MotionDirector.


def test_the_debiased_loss_over_all_anchors():
    """mse + 3 mse - 2 sqrt 2 mse of the mean over frames; so 4 on motion, 4 - 2 sqrt 2 on what is constant."""
    target, error = torch.randn(2, 1, 16, 5, 4, 4, dtype=torch.float64)

    def over_anchors(e):
        return np.mean([debiased_loss(prediction(target + e, target, anchor)).item() for anchor in range(5)])

    mse, mse_of_mean = error.square().mean(), error.mean(2).square().mean()
    assert over_anchors(error) == pytest.approx((4 * mse - 2 * math.sqrt(2) * mse_of_mean).item())
    moving = error - error.mean(2, keepdim=True)
    assert over_anchors(moving) == pytest.approx(4 * moving.square().mean().item())
    constant = error.mean(2, keepdim=True).expand_as(error)
    for anchor in range(5):
        got = debiased_loss(prediction(target + constant, target, anchor)).item()
        assert got == pytest.approx((4 - 2 * math.sqrt(2)) * constant.square().mean().item())


def test_debiased_velocities():
    v = torch.randn(1, 16, 4, 2, 2)
    assert torch.equal(debias(v, 2, 0.0), v)
    torch.testing.assert_close(debias(v, 2, 2.0)[:, :, 1], 5**0.5 * v[:, :, 1] - 2 * v[:, :, 2])
    p = prediction(v, torch.randn_like(v))
    torch.testing.assert_close(debiased_loss(p, 0.0), 2 * denoising_loss(p))
    torch.testing.assert_close(
        debiased_loss(p, 1.0) - denoising_loss(p), (debias(p.velocity - p.target, 0, 1.0)).square().mean()
    )


def test_each_pass_of_motiondirector_trains_its_own(dit, text, clips):
    config = MotionDirectorConfig(rank=4, fit_steps=(0, 2), fit_lr=(0, 1e-2), beta=0.5, spatial_share=1.0)
    p = motiondirector.plan(dit, clips, text, config, 0)
    (stage,) = p.stages
    still, moving = stage.passes
    assert (stage.steps, stage.lr, stage.decay, p.strengths) == (2, 1e-2, 1e-2, (0.0, 1.0))
    assert still.clips == clips["spatial"] and moving.clips == clips["temporal"]
    assert len(p.parts["spatial"]) == len(p.parts["temporal"]) == 8
    assert not still.frozen and moving.frozen == (p.parts["spatial"],)
    rng = np.random.default_rng(0)
    gradients_of(dit, still, text, rng, 5.0, "none")
    assert all(w.grad is None for w in p.parts["temporal"].parameters())
    assert any(w.grad.any() for w in p.parts["spatial"].parameters())
    before = [w.grad.clone() for w in p.parts["spatial"].parameters()]
    gradients_of(dit, moving, text, rng, 5.0, "block")
    assert any(w.grad.any() for w in p.parts["temporal"].parameters())
    assert all(torch.equal(a, w.grad) for a, w in zip(before, p.parts["spatial"].parameters()))
    v = torch.randn(1, 16, 3, 4, 6)
    q = prediction(v, -v, 2)
    assert moving.loss(q) == debiased_loss(q, 0.5) != debiased_loss(q, 1.0) and still.loss is denoising_loss
    log = Fit(p.stages, seed=0).run(dit, text, shift=5.0)
    assert [entry["pass"] for entry in log] == ["spatial", "temporal"] * 2
    less = motiondirector.plan(dit, clips, text, replace(config, spatial_share=0.0), 0)
    log = Fit(less.stages, seed=0).run(dit, text, shift=5.0)
    assert [entry["pass"] for entry in log] == ["temporal"] * 2
    assert not any(lora.B.any() for lora in less.parts["spatial"].values())
    sets = motiondirector.frame_sets(config, 9)
    assert sets["spatial"] == [range(i, i + 1) for i in range(9)] and sets["temporal"] == [range(9)]


# MotionInversion.


def filled(value="full", frames=FRAMES):
    part = Embeddings(2, DIM, (frames, *GRID[1:]), value)
    for weight in part.parameters():
        torch.nn.init.normal_(weight)
    return part


def test_embeddings_of_zero_change_nothing(dit, text, clips):
    x = clips["whole"][0]
    base = dit(x, T, text)
    for value in ("full", "place", "none"):
        with attached(dit, Embeddings(2, DIM, GRID, value)):
            assert torch.equal(dit(x, T, text), base)
        part = filled(value)
        with attached(dit, part):
            assert (dit(x, T, text) - base).abs().max() > 1e-3
        part.set_strength(0.0)
        with attached(dit, part):
            assert torch.equal(dit(x, T, text), base)
    assert torch.equal(dit(x, T, text), base)


def test_an_embedding_goes_through_the_layers(dit):
    """q, k and v of block 1 get W times their own; q and k the same at all places of a frame."""
    part, attention, x = filled(), dit.blocks[1].self_attn, torch.randn(1, FRAMES * SIZE, DIM)
    time = part.qk[1].repeat_interleave(SIZE, 0)
    place = part.v[1].reshape(FRAMES * SIZE, DIM)
    plain = {name: getattr(attention, name)(x) for name in "qkv"}
    with attached(dit, part):
        for name, embedding in (("q", time), ("k", time), ("v", place)):
            layer = getattr(attention, name)
            torch.testing.assert_close(layer(x), plain[name] + embedding @ layer.weight.T, rtol=1e-5, atol=1e-5)
    order = torch.tensor([3, 0, 5, 1, 2, 4])  # of a frame's positions: q and k do not know them, v does
    by_frame = [of(1, FRAMES * SIZE).unflatten(0, (FRAMES, SIZE)) for of in (part.of_qk, part.of_v)]
    assert [torch.equal(x[:, order], x) for x in by_frame] == [True, False]
    still = filled("place")
    torch.testing.assert_close(still.of_v(0, FRAMES * SIZE), still.v[0, 0].repeat(FRAMES, 1))


def test_differences_take_out_what_is_constant():
    e = torch.randn(5, 4, 3)
    constant, ramp = e[:1].expand(5, 4, 3), torch.arange(5.0)[:, None, None] * e[:1] + e[1:2]
    assert torch.equal(differences(constant), torch.cat([e[:1], torch.zeros(4, 4, 3)]))
    torch.testing.assert_close(differences(ramp), torch.cat([e[1:2], e[:1].expand(4, 4, 3)]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(differences(e).cumsum(0), e, rtol=1e-5, atol=1e-5)
    part = filled()
    before = part.of_v(0, FRAMES * SIZE)
    part.set_differences(True)
    torch.testing.assert_close(part.of_v(0, FRAMES * SIZE), differences(part.v[0]).flatten(0, 1))
    part.set_differences(False)
    assert torch.equal(part.of_v(0, FRAMES * SIZE), before)
    still = filled("place")
    still.set_differences(True)
    assert still.of_v(0, FRAMES * SIZE).any() and not still.differs  # it has no time to take differences over


def test_embeddings_fit_other_lengths():
    e = torch.randn(3, 4, 2)
    assert at_length(e, 3) is e
    longer = at_length(e, 5)
    torch.testing.assert_close(longer[::2], e)
    torch.testing.assert_close(longer[1], (e[0] + e[1]) / 2)
    assert filled().of_qk(0, 7 * SIZE).shape == filled().of_v(0, 7 * SIZE).shape == (7 * SIZE, DIM)


def test_motioninversion_trains_its_embeddings(dit, text, clips):
    config = MotionInversionConfig(fit_steps=(0, 2), value="full", adapter_strength=0.7)
    p = motioninversion.plan(dit, clips, text, config, 0)
    (stage,) = p.stages
    part = p.parts["embeddings"]
    assert (stage.steps, stage.lr, stage.decay, p.strengths) == (2, 0.02, 0.01, (0.7,))
    Fit(p.stages, seed=0).run(dit, text, shift=5.0)
    assert part.qk.any() and part.v.any() and part.v.shape == (2, 3, 6, DIM)
    assert not part.differs
    p.prepare()
    assert part.differs
    assert motioninversion.plan(dit, clips, text, replace(config, value="none"), 0).parts["embeddings"].v is None
    assert stage.passes[0].loss is denoising_loss
    debiased = motioninversion.plan(dit, clips, text, replace(config, debiased=True, difference=False), 0)
    assert debiased.stages[0].passes[0].loss is debiased_loss
    debiased.prepare()
    assert not debiased.parts["embeddings"].differs
    longer = {"temporal": [torch.randn(1, 16, 5, 4, 6)]}
    again = motioninversion.plan(dit, longer, text, config, 0, p.report).parts["embeddings"]
    again.load_state_dict(part.state_dict())  # of the length that it was trained on
    with pytest.raises(UserError, match="value must be one of place, full, none"):
        replace(config, value="all")


@pytest.mark.parametrize("options", [MotionInversionConfig, DeTConfig])
def test_the_strength_of_what_was_trained_is_not_the_samplers(options):
    """Of which 1 starts from noise, and less from the reference itself."""
    config = options(adapter_strength=0.3)
    assert config.strength == 1.0 and training_options(config) == training_options(options())
    assert training_options(options(rank=3) if options is DeTConfig else options(value="none")) != training_options(
        config
    )


# DeT.


def test_convolutions_of_zero_change_nothing(dit, text, clips):
    x = clips["whole"][0]
    base = dit(x, T, text)
    part = TemporalConvs(2, DIM, 8, SIZE, seed=1)
    with attached(dit, part):
        assert torch.equal(dit(x, T, text), base)
        for conv in part:
            torch.nn.init.normal_(conv.up)
        assert (dit(x, T, text) - base).abs().max() > 1e-3
        part.set_strength(0.0)
        assert torch.equal(dit(x, T, text), base)
    assert torch.equal(dit(x, T, text), base)


def test_a_kernel_acts_along_time_alone(dit):
    """An impulse at frame 3, place 4 reaches frames 1 to 5 at place 4, in the attention's output."""
    part, attention = TemporalConvs(2, DIM, 8, SIZE, seed=1), dit.blocks[1].self_attn
    torch.nn.init.normal_(part[1].up)
    frames = 7
    x = torch.zeros(1, frames * SIZE, DIM)
    x[0, 3 * SIZE + 4] = 1.0
    rope = (torch.ones(frames * SIZE, 1, 6), torch.zeros(frames * SIZE, 1, 6))
    plain = attention(x, rope=rope)
    with attached(dit, part):
        change = (attention(x, rope=rope) - plain)[0].unflatten(0, (frames, SIZE)).abs().sum(-1)
    reached = (change > 1e-5).nonzero().tolist()
    assert reached == [[f, 4] for f in range(1, 6)]


def test_a_convolution_by_hand():
    conv = TemporalConv(4, 2, torch.Generator().manual_seed(0))
    x = torch.rand(5, 4, 6)
    with torch.no_grad():
        conv.down.zero_()
        conv.down[0, 1, 1] = 1.0  # the second channel as it is
        conv.up[3, 0] = 1 / 3  # a box filter, to the last channel
    hidden = torch.nn.functional.gelu(x[:, 1])
    padded = torch.nn.functional.pad(hidden, (1, 1))
    box = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
    torch.testing.assert_close(conv(x)[:, 3], box)
    assert not conv(x)[:, :3].any()
    start = TemporalConv(1536, 8, torch.Generator().manual_seed(0))
    inner = torch.nn.functional.conv1d(torch.randn(50, 1536, 6), start.down)
    assert inner.std().item() == pytest.approx(1, abs=0.1)


def test_tracks():
    frames, size = torch.arange(4), 8
    positions = torch.stack(
        [torch.stack([frames + 0.9, frames * 0 + 2.5], -1), torch.stack([frames * 0 + 5.0, frames + 1.0], -1)]
    )
    follows = torch.zeros(1, 2, 4, size, size)
    follows[0, :, frames, frames, 2] = 3.0
    follows[0, :, frames, 5, frames + 1] = 7.0
    visible = torch.ones(2, 4, dtype=torch.bool)
    assert tracking_loss(follows, positions, visible) == 0
    still = torch.zeros(1, 1, 4, size, size)
    still[0, 0, :, 1, 2] = 2.0  # the first point passes it in frame 1 only: 0, 2, 0, 0
    assert tracking_loss(still, positions, visible).item() == pytest.approx((4 + 4) / 6)
    visible[0, 1] = False  # the step into it does not count
    assert tracking_loss(still, positions, visible).item() == pytest.approx(4 / 5)
    visible[0, 1] = True
    for place in (-0.5, 8.0):  # outside, above or below: neither the step there nor the one back counts
        leaves = positions.clone()
        leaves[0, 2, 0] = place
        assert tracking_loss(still, leaves, visible).item() == pytest.approx(4 / 4)
    x = torch.randn(1, 1, 4, size, size, requires_grad=True)
    visible[:] = False
    visible[1] = True
    (gradient,) = torch.autograd.grad(tracking_loss(x, positions, visible), x)
    assert not gradient[0, 0, frames, frames, 2].any() and gradient[0, 0, frames, 5, frames + 1].any()
    v, noised = torch.randn(2, 1, 1, 4, size, size)
    p = prediction(v, -v, sigma=0.4, noised=noised)
    expected = denoising_loss(p) + 0.1 * tracking_loss(noised - 0.4 * v, positions, visible)
    assert tracked_loss(p, positions, visible) == expected
    p = p._replace(sigma=0.41)
    assert tracked_loss(p, positions, visible) == denoising_loss(p)


def test_det_trains_its_convolutions(dit, text, clips):
    config = DeTConfig(fit_steps=(0, 2), fit_lr=(0, 1e-3), rank=8, adapter_strength=0.6)
    p = det.plan(dit, clips, text, config, 0)
    (stage,) = p.stages
    assert (stage.steps, stage.lr, stage.decay, stage.betas, p.strengths) == (2, 1e-3, 1e-4, (0.9, 0.95), (0.6,))
    Fit(p.stages, seed=0).run(dit, text, shift=5.0)
    assert all(conv.up.any() for conv in p.parts["convolutions"])
    tracks = torch.zeros(2, 3, 2), torch.ones(2, 3, dtype=torch.bool)
    loss = det.plan(dit, clips, text, config, 0, tracks=tracks).stages[0].passes[0].loss
    v = torch.randn(1, 16, 3, 4, 6)
    q = prediction(v, -v, sigma=0.2)
    assert loss(q) == tracked_loss(q, *tracks) != stage.passes[0].loss(q)


@pytest.mark.parametrize("kind", ["embeddings", "convolutions"])
def test_recomputed_and_offloaded_blocks_have_their_parts(dit, text, clips, kind):
    part = filled() if kind == "embeddings" else TemporalConvs(2, DIM, 8, SIZE, seed=1)
    for weight in part.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    gradients = []
    for offload, policy in ((False, "none"), (True, "selective"), (True, "block")):
        with on_device(dit, torch.device("cpu"), offload_blocks=offload), attached(dit, part):
            loss = dit(clips["whole"][0], T, text, recompute=policy).square().mean()
            gradients.append(torch.autograd.grad(loss, list(part.parameters())))
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other))
