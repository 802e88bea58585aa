"""The training-free peers: their losses in closed form, what they read and when, and whole runs of each."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import fastvmt
from fastvmt import MotionConfig
from skip_optim import optimize
from wan_mini.device.memory import gradient_bytes
from wan_mini.errors import UserError
from wan_mini.peers.ditflow import (
    DiTFlow,
    DiTFlowConfig,
    displacement,
    flow_distance,
    replace_keys_values,
    stored_keys_values,
)
from wan_mini.peers.flowmotion import FlowMotion, FlowMotionConfig, latent_distance
from wan_mini.peers.guidance import adam_updates, stream_before
from wan_mini.peers.moft import MOFT, MOFTConfig, change_distance, motion_channels, without_mean
from wan_mini.peers.motionclone import (
    MotionClone,
    MotionCloneConfig,
    Target,
    entry_distance,
    ramp,
    temporal_attention,
)
from wan_mini.peers.smm import SMM, SMMConfig, mean_distance
from wan_mini.peers.training_free import PEERS, costs, gradient_of, preset_of, transfer, unguided
from wan_mini.pipeline import guided_velocity
from wan_mini.prompts import encode_prompts
from wan_mini.runs.request import load_preset
from wan_mini.scheduler import FlowEuler
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.world import make_clip
from window import dense_amf, frame_pairs

CPU = torch.device("cpu")
SMALL = {"steps": 4, "shift": 3.0, "cfg": 4.0, "negative": "a dog", "guidance_fraction": 0.5, "optim_steps": 2}


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return make_clip(0).frames[:9, ::2, ::2].copy()  # (9,64,96,3): 3 latent frames of 4 x 6 tokens


@pytest.fixture(scope="module")
def inputs(wan) -> dict[str, Tensor]:
    """A reference, noise, and two texts for a guidance on the random model."""
    generator = torch.Generator().manual_seed(1)
    text, empty_text = encode_prompts(wan, ["a ball", ""], CPU)
    shape = (1, 16, 3, 8, 12)
    reference = torch.randn(shape, generator=generator)
    return {
        "reference": reference,
        "noise": torch.randn(shape, generator=generator),
        "text": text,
        "empty_text": empty_text,
    }


# DiTFlow


def moving_features(grid: tuple[int, int, int], step: tuple[int, int]) -> Tensor:
    """Queries, or keys, (1,N,1,D) of a picture that shifts by `step` tokens a frame, every token of it its own."""
    f, h, w = grid
    reach = f * max(map(abs, step))
    canvas = 30 * torch.eye((h + 2 * reach) * (w + 2 * reach)).unflatten(0, (h + 2 * reach, -1))
    frames = []
    for frame in range(f):
        top, left = reach - frame * step[0], reach - frame * step[1]
        frames.append(canvas[top : top + h, left : left + w].flatten(0, 1))
    return torch.cat(frames)[None, :, None]


def inside(grid: tuple[int, int, int], step: tuple[int, int]) -> Tensor:
    """Which tokens (F,F,S) of frame i are still in frame j."""
    f, h, w = grid
    seen = torch.zeros(f, f, h, w, dtype=torch.bool)
    for i in range(f):
        for j in range(f):
            rows, columns = torch.arange(h) + (j - i) * step[0], torch.arange(w) + (j - i) * step[1]
            seen[i, j] = ((rows >= 0) & (rows < h))[:, None] & ((columns >= 0) & (columns < w))
    return seen.flatten(2)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("step", [(1, 0), (0, -2), (-1, 1)])
def test_a_shift_is_read_exactly_in_all_ordered_pairs(step, hard):
    grid = (3, 5, 6)
    x = moving_features(grid, step)
    flow = displacement(x, x, grid, hard=hard)
    distance = torch.arange(3) - torch.arange(3)[:, None]  # j - i, backward and self too
    expected = distance[:, :, None, None] * torch.tensor(step)
    error = (flow - expected).abs().amax(-1)
    assert flow.shape == (3, 3, 30, 2)
    assert error[inside(grid, step)].max() < 1e-4


def test_the_soft_flow_is_fastvmts_dense_flow():
    grid = (4, 3, 5)
    q, k = torch.randn(2, 1, 60, 2, 8)
    pairs = frame_pairs(4, 3)
    flow = displacement(q, k, grid, tau=3.0)
    ours = torch.stack([flow[i, j] for i, j in pairs])
    assert torch.allclose(ours, dense_amf(q, k, grid, pairs, tau=3.0), atol=1e-6)


def test_nine_latent_frames_work():
    x = torch.randn(1, 9 * 6, 2, 8)
    assert displacement(x, x, (9, 2, 3)).shape == (9, 9, 6, 2)


def test_only_moved_tokens_count_and_both_coordinates():
    """By columns 2 in the reference and dx in the video, in one token of three: (dx - 2)^2 / 2."""
    reference = torch.zeros(2, 2, 3, 2)
    reference[..., 1, 1] = 2
    for dx in (2.0, 3.0, -1.0):
        flow = torch.full((2, 2, 3, 2), 7.0)
        flow[..., 1, :] = torch.tensor([0, dx])
        assert flow_distance(reference, flow).item() == pytest.approx((dx - 2) ** 2 / 2)
        everywhere = ((dx - 2) ** 2 + 4 * 49) / 6
        assert flow_distance(reference, flow, moved_only=False).item() == pytest.approx(everywhere)


def test_a_static_reference_asks_for_nothing():
    flow = torch.randn(2, 2, 3, 2, requires_grad=True)
    loss = flow_distance(torch.zeros(2, 2, 3, 2), flow)
    (gradient,) = torch.autograd.grad(loss, flow)
    assert loss.item() == 0 and not gradient.any()


def test_a_frame_with_itself_adds_nothing_where_queries_are_keys():
    x = torch.nn.functional.normalize(torch.randn(1, 24, 1, 16), dim=-1)
    hard = displacement(x, x, (2, 3, 4), hard=True)
    assert not hard.diagonal().any()
    flow = displacement(x, x, (2, 3, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(flow_distance(hard, flow), flow)
    assert not gradient.diagonal().any() and gradient.any()


def velocity(wan, latents, text) -> Tensor:
    with torch.no_grad():
        return wan.dit(latents, torch.tensor([500.0]), text)


@pytest.mark.parametrize("blocks", [(0,), (2, 0), (0, 1, 2, 3, 4, 5)])
def test_injecting_its_own_keys_and_values_changes_nothing(wan, inputs, blocks):
    x, text = inputs["reference"], inputs["text"]
    plain = velocity(wan, x, text)
    stored = stored_keys_values(wan.dit, blocks, x, torch.tensor(500.0), text)
    assert len(stored) == 2 * len(blocks)
    handles = replace_keys_values(wan.dit, blocks, stored)
    own, other = velocity(wan, x, text), velocity(wan, inputs["noise"], text)
    for handle in handles:
        handle.remove()
    assert torch.equal(own, plain)
    assert not torch.equal(other, velocity(wan, inputs["noise"], text))
    assert torch.equal(velocity(wan, x, text), plain)


def test_no_gradient_flows_through_injected_keys(wan, inputs):
    text = inputs["text"]
    stored = stored_keys_values(wan.dit, (0,), inputs["reference"], torch.tensor(500.0), text)
    handles = replace_keys_values(wan.dit, (0,), stored)
    x = inputs["noise"].clone().requires_grad_()
    try:
        q, k = wan.dit(x, torch.tensor([500.0]), text, qk_block=0)
    finally:
        for handle in handles:
            handle.remove()
    assert q.requires_grad and not k.requires_grad


def test_the_reference_is_injected_into_both_passes_of_guided_steps_only(wan, clip):
    """Each velocity pass of a guided step has the keys of the reference, noised to its level, with the prompt."""
    config = DiTFlowConfig(**SMALL, inject=(0, 2))
    keys, passes = [], []
    handles = [wan.dit.blocks[2].self_attn.norm_k.register_forward_pre_hook(lambda m, args: keys.append(args[0]))]
    handles += [
        wan.dit.register_forward_hook(
            lambda m, args, output: passes.append((args[1].item(), isinstance(output, tuple), args[0], keys[-1]))
        )
    ]
    transfer(wan, clip, "a ball", config)
    for handle in handles:
        handle.remove()
    z_ref = passes[0][2]
    noise = torch.randn(z_ref.shape, generator=torch.Generator().manual_seed(0))
    (text,) = encode_prompts(wan, ["a ball"], CPU)
    velocities = [(t, k) for t, stopped, _, k in passes if not stopped]
    assert len(velocities) == 8
    for number, (t, k) in enumerate(velocities):
        sigma = t / 1000
        noised = (1 - sigma) * z_ref + sigma * noise
        expected = stored_keys_values(wan.dit, (0, 2), noised, torch.tensor(t), text)[2]  # of block 2: the text matters
        close = torch.allclose(k, expected, atol=1e-5)
        assert close == (number < 4), number
    assert not wan.dit.blocks[2].self_attn.k._forward_hooks


def test_hooks_are_gone_even_if_all_steps_are_guided(wan, clip):
    transfer(wan, clip, "a ball", DiTFlowConfig(**{**SMALL, "steps": 1, "guidance_fraction": 1.0, "inject": (0, 5)}))
    for block in wan.dit.blocks:
        assert not block.self_attn.k._forward_hooks and not block.self_attn.v._forward_hooks


def test_a_block_that_does_not_exist_is_refused(wan, inputs):
    with pytest.raises(UserError, match="inject must be at most 5, got 6"):
        stored_keys_values(wan.dit, (6,), inputs["reference"], torch.tensor(500.0), inputs["text"])


# SMM


def test_means_do_not_see_order_shift_and_size():
    reference, other = torch.randn(2, 4, 6, 8)
    means, loss = reference.mean(1), mean_distance(other.mean(1), reference.mean(1))
    shuffled = torch.stack([frame[torch.randperm(6)] for frame in other]).mean(1)
    assert mean_distance(shuffled, means).item() == pytest.approx(loss.item(), abs=1e-5)
    assert mean_distance(other.mean(1) + torch.randn(8), means).item() == pytest.approx(loss.item(), abs=1e-5)
    assert mean_distance(5 * means, means).item() == pytest.approx(0, abs=1e-6)
    assert mean_distance(-means, means).item() == pytest.approx(2, abs=1e-6)


def test_two_frames_have_one_pair_each_way():
    means, reference = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 3.0], [4.0, 4.0]])
    assert mean_distance(means, reference).item() == pytest.approx(1 - math.sqrt(0.5), abs=1e-6)


@pytest.mark.parametrize("frames", [2, 5])
def test_the_published_form_cannot_reach_zero(frames):
    means = torch.randn(frames, 8)
    assert mean_distance(means, means, "published").item() == pytest.approx(1 / frames, abs=1e-6)


def test_ditflows_port_sees_a_shift_and_compares_over_time():
    """Its anchor is the reference's. Scaling a channel of all frames is no change to a cosine over time."""
    means = torch.randn(4, 8, dtype=torch.float64)
    shift = torch.randn(8, dtype=torch.float64)
    assert mean_distance(means, means, "ditflow").item() == pytest.approx(0, abs=1e-6)
    assert mean_distance(means + shift, means, "ditflow") > 0.01
    assert mean_distance(means + shift, means).item() == pytest.approx(0, abs=1e-6)
    change = means[None] - means[:, None]  # by loops: anchors, channels
    other = means + shift - means[:, None]
    cosines = [
        torch.dot(change[i, :, c], other[i, :, c]) / change[i, :, c].norm() / other[i, :, c].norm()
        for i in range(4)
        for c in range(8)
    ]
    expected = 1 - torch.stack(cosines).mean()
    assert mean_distance(means + shift, means, "ditflow").item() == pytest.approx(expected.item(), abs=1e-9)


def test_the_gradient_of_equal_means_is_finite():
    means = torch.randn(4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(mean_distance(means, means.detach()), means)
    assert torch.isfinite(gradient).all()


# MOFT


def test_what_all_frames_share_does_not_count():
    features, static = torch.randn(3, 5, 8), torch.randn(1, 5, 8)
    assert torch.allclose(without_mean(features + static), without_mean(features), atol=1e-6)


def test_channels_that_vary_in_time_are_chosen():
    features = torch.randn(1, 20, 16).expand(5, 20, 16).clone()  # at rest
    wave = torch.randn(5, 20, 1)
    features[..., [3, 7]] += wave
    changes = without_mean(features)
    assert motion_channels(changes, 2 / 16).tolist() == [3, 7]
    assert motion_channels(-changes, 2 / 16).tolist() == [3, 7]
    assert len(motion_channels(changes, 0.25)) == 4 and len(motion_channels(changes, 0.01)) == 1


def test_channels_are_those_of_the_right_singular_vector():
    changes = torch.randn(4, 10, 12, dtype=torch.float64)
    vector = torch.linalg.svd(changes.flatten(0, 1), full_matrices=False).Vh[0]
    assert set(motion_channels(changes, 0.5).tolist()) == set(vector.abs().topk(6).indices.tolist())


def test_the_distance_of_changes():
    changes = without_mean(torch.randn(4, 6, 8))
    static = torch.randn(1, 6, 8)
    assert change_distance(changes, changes).item() == pytest.approx(0, abs=1e-4)
    assert change_distance(without_mean(static - changes), changes).item() == pytest.approx(2, abs=1e-4)
    path = torch.linspace(-1, 1, 5)[:, None, None] * torch.randn(1, 6, 8)
    assert change_distance(path.flip(0)[[0, 1, 3, 4]], path[[0, 1, 3, 4]]).item() == pytest.approx(2, abs=1e-4)


def test_tokens_at_rest_give_finite_gradients():
    for reference in (torch.zeros(3, 4, 8), torch.randn(3, 4, 8) * torch.tensor([0, 0, 1.0, 1])[:, None]):
        changes = torch.zeros(3, 4, 8, requires_grad=True)
        loss = change_distance(changes, reference)
        (gradient,) = torch.autograd.grad(loss, changes)
        assert loss.item() == pytest.approx(1) and torch.isfinite(gradient).all()
        assert not gradient[:, :2].any()


# MotionClone


def test_rows_of_temporal_attention():
    q, k = torch.randn(2, 1, 3 * 4, 2, 8)
    maps = temporal_attention(q, k, (3, 2, 2))
    assert maps.shape == (4, 2, 3, 3)
    assert torch.allclose(maps.sum(-1), torch.ones(4, 2, 3)) and not maps.diagonal(dim1=-2, dim2=-1).any()
    whole = temporal_attention(q, k, (3, 2, 2), diagonal=True)
    queries = q[0].unflatten(0, (3, 4))[:, 1, 0]  # position 1, head 0
    keys = k[0].unflatten(0, (3, 4))[:, 1, 0]
    assert torch.allclose(whole[1, 0], (queries @ keys.T / math.sqrt(8)).softmax(-1), atol=1e-6)


def test_equal_frames_attend_equally(wan, inputs):
    q = torch.randn(1, 1, 4, 2, 8).expand(1, 3, 4, 2, 8).flatten(1, 2)
    maps = temporal_attention(q, q, (3, 2, 2), diagonal=True)
    assert torch.allclose(maps, torch.full_like(maps, 1 / 3))
    target = Target(torch.full((4, 2, 3, 1), 0.9), torch.zeros(4, 2, 3, 1, dtype=torch.long))
    assert entry_distance(maps, target).item() == pytest.approx((0.9 - 1 / 3) ** 2)


def guidance_of(kind, config, wan, inputs, recompute="none"):
    return kind(wan.dit, config=config, recompute=recompute, **inputs)


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_only_gradients_recompute(wan, inputs, recompute, monkeypatch):
    """Peers read queries and keys as ReferenceGuidance does."""
    guidance = guidance_of(MotionClone, MotionCloneConfig(**SMALL), wan, inputs, recompute)
    forward, seen = wan.dit.forward, []

    def watched(*arguments, **options):
        seen.append(options["recompute"])
        return forward(*arguments, **options)

    monkeypatch.setattr(wan.dit, "forward", watched)
    for needs_gradient in (True, False):
        x = inputs["noise"].clone().requires_grad_(needs_gradient)
        guidance.queries_keys(x, torch.tensor(500.0), inputs["text"])
    assert seen == [recompute, "none"]


def test_entries_are_the_references(wan, inputs):
    config = MotionCloneConfig(**SMALL)
    guidance = guidance_of(MotionClone, config, wan, inputs)
    q, k = torch.randn(2, 1, 72, 2, 24)
    target = guidance.target_of((q, k))
    maps = temporal_attention(q, k, guidance.grid)
    assert torch.equal(target.frames[..., 0], maps.argmax(-1))
    assert not (target.frames == torch.arange(3)[:, None]).any() and guidance.report()["self_share"] == 0
    q.requires_grad_()
    loss = guidance.distance((q, k), target)
    (gradient,) = torch.autograd.grad(loss, q)
    assert loss.item() == 0 and not gradient.any()
    order = [2, 0, 1]
    permuted = [x.detach().unflatten(1, (3, 24))[:, order].flatten(1, 2) for x in (q, k)]
    moved = temporal_attention(*permuted, guidance.grid).gather(-1, target.frames)
    expected = (moved - target.values).square().mean()
    assert guidance.distance(permuted, target).item() == pytest.approx(expected.item())


def test_all_entries_are_the_dense_difference(wan, inputs):
    guidance = guidance_of(MotionClone, MotionCloneConfig(**SMALL, top=3, diagonal=True), wan, inputs)
    one, other = torch.randn(2, 2, 1, 72, 2, 24)
    maps = partial(temporal_attention, grid=guidance.grid, diagonal=True)
    expected = (maps(*one) - maps(*other)).square().mean()
    assert guidance.distance(other, guidance.target_of(one)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_diagonal_can_be_kept(wan, inputs):
    x = torch.nn.functional.normalize(torch.randn(1, 72, 2, 24), dim=-1)
    guidance = guidance_of(MotionClone, MotionCloneConfig(**SMALL, diagonal=True), wan, inputs)
    guidance.target_of((x, x))
    assert guidance.report()["self_share"] == 1


def test_the_ramp():
    assert [ramp(index, 10) for index in range(10)] == [0.5, *[1.0] * 8, 0.5]
    assert [ramp(index, 3) for index in range(3)] == [1.0] * 3


@pytest.mark.parametrize(("steps", "guided"), [(4, 2), (10, 10)])
def test_the_score_update_shifts_what_a_step_arrives_at(wan, clip, steps, guided):
    """x' - weight ramp sigma sigma' gradient, by a plain loop; with weight 0 plain sampling to the bit."""
    options = SMALL | {"steps": steps, "guidance_fraction": guided / steps}
    config = MotionCloneConfig(**options, update="score", score_weight=1e6)
    result = transfer(wan, clip, "a ball", config)
    still = transfer(wan, clip, "a ball", replace(config, score_weight=0.0))
    plain = transfer(wan, clip, "a ball", unguided(config))
    assert torch.equal(still.latents, plain.latents) and not torch.equal(result.latents, plain.latents)
    assert result.report["gradients"] == guided and plain.report["gradients"] == 0
    text, negative, empty = encode_prompts(wan, ["a ball", "a dog", ""], CPU)
    with torch.no_grad():
        z_ref = wan.vae.encode(torch.from_numpy(clip).movedim(-1, 0)[None].float() / 127.5 - 1)
    noise = torch.randn(z_ref.shape, generator=torch.Generator().manual_seed(0))
    guidance = MotionClone(wan.dit, z_ref, noise, text, empty, config)
    scheduler = FlowEuler(steps, 3.0)
    x = noise
    for index, t in enumerate(scheduler.timesteps):
        sigma, after = scheduler.sigmas[index], scheduler.sigmas[index + 1]
        gradient = 0
        if index < guided:
            y = x.clone().requires_grad_()
            loss = guidance.loss(y, t, guidance.target_at(sigma, t))
            (gradient,) = torch.autograd.grad(loss, y)
        with torch.no_grad():
            x = scheduler.step(index, x, guided_velocity(wan.dit, x, t, text, negative, 4.0))
        x = x - 1e6 * ramp(index, guided) * sigma * after * gradient
    assert torch.allclose(result.latents, x, atol=1e-4)


# FlowMotion


def test_the_distance_of_latents():
    """By 1 in the second of two frames: half of all values, and every change."""
    x = torch.zeros(1, 16, 2, 2, 2)
    x[:, :, 1] = 1
    assert latent_distance(x, torch.zeros_like(x)).item() == pytest.approx(20 * 0.5 + 5 * 1)
    assert latent_distance(x + 3, x, (0.0, 5.0)).item() == 0


@pytest.mark.parametrize("velocity", ["update", "step"])
def test_the_gradient_goes_through_the_latents_alone(wan, inputs, velocity):
    """With a constant v the gradient of mean((x - sigma v - z)^2) is 2 (x - sigma v - z) / n."""
    config = FlowMotionConfig(**SMALL, reference="clean", weights=(1.0, 0.0), velocity=velocity)
    guidance = guidance_of(FlowMotion, config, wan, inputs)
    sigma, t = torch.tensor(0.8), torch.tensor(800.0)
    x = inputs["noise"].clone().requires_grad_()
    loss = guidance.loss_at(inputs["noise"], sigma, t)(x)
    (gradient,) = torch.autograd.grad(loss, x)
    v = wan.dit(inputs["noise"], t.reshape(1), inputs["text"]).detach()
    expected = 2 * (inputs["noise"] - 0.8 * v - inputs["reference"]) / x.numel()
    assert torch.allclose(gradient, expected, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({"reference": "noised", "velocity": "update"}, 2 * (1 + 2)),
        ({"reference": "noised", "velocity": "step"}, 2 * (1 + 1)),
        ({"reference": "clean", "velocity": "step"}, 2),
    ],
)
def test_no_pass_of_the_model_has_a_gradient(wan, clip, options, forwards):
    grads = []
    handle = wan.dit.register_forward_hook(lambda m, args, output: grads.append(torch.is_grad_enabled()))
    result = transfer(wan, clip, "a ball", FlowMotionConfig(**SMALL, **options))
    handle.remove()
    assert not any(grads) and len(grads) == forwards + 8 + 2  # with denoising, and the flows that are stored
    assert result.report["forwards"] == forwards and result.report["gradients"] == 0


def test_the_predicted_reference_is_its_own_x0(wan, inputs):
    guidance = guidance_of(FlowMotion, FlowMotionConfig(**SMALL, weights=(1.0, 0.0)), wan, inputs)
    sigma, t = torch.tensor(0.8), torch.tensor(800.0)
    noised = 0.2 * inputs["reference"] + 0.8 * inputs["noise"]
    target = noised - 0.8 * wan.dit(noised, t.reshape(1), inputs["empty_text"]).detach()
    x0 = noised - 0.8 * wan.dit(noised, t.reshape(1), inputs["text"]).detach()
    expected = (x0 - target).square().mean().item()
    assert guidance.loss_at(noised, sigma, t)(noised).item() == pytest.approx(expected, rel=1e-4)


# What they share


def test_adam_is_the_guidances_own_without_reuse():
    target = torch.randn(3, 4)

    def loss(x: Tensor) -> Tensor:
        return (x - target).square().mean()

    x = torch.randn(3, 4)
    rates = [0.03, 0.025, 0.02]
    ours, losses, norms = adam_updates(x, loss, rates)
    theirs, report = optimize(x, loss, steps=3, interval=1, lr=(0.03, 0.02))
    assert torch.equal(ours, theirs) and losses == report.losses and len(norms) == 3


def test_a_loss_that_is_not_finite_is_said():
    with pytest.raises(FloatingPointError, match="loss is nan at update 0"):
        adam_updates(torch.ones(2), lambda x: (x * float("nan")).sum(), [0.1])


def test_rates_fall_over_steps_or_over_updates():
    config = DiTFlowConfig()
    steps = [config.rates(index) for index in range(config.guided_steps)]
    assert len(steps) == 10 and steps[0] == [0.002] * 5 and steps[-1] == pytest.approx([0.0011] * 5)
    assert steps[1] == pytest.approx([0.0019] * 5)
    over = replace(config, lr_over="updates", lr=(0.003, 0.001), optim_steps=3)
    assert over.rates(0) == over.rates(9) == pytest.approx([0.003, 0.002, 0.001])


def test_what_the_published_schedules_can_move():
    assert DiTFlowConfig().travel() == pytest.approx(0.0775) and SMMConfig().travel() == pytest.approx(1.1)
    fastvmts = {"optim_steps": 10, "lr": (0.003, 0.002), "lr_over": "updates"}
    assert replace(DiTFlowConfig(), **fastvmts).travel() == pytest.approx(0.25)


@pytest.mark.parametrize("name", PEERS)
def test_budgets_of_a_checkpoint(name):
    """Equal: FastVMT's share, updates and rates. Own: the authors' share and updates, and as far to go."""
    equal, own = preset_of(CHECKPOINT, name)[1], preset_of(CHECKPOINT, name, "own")[1]
    authors = PEERS[name].config
    _, c = load_preset(CHECKPOINT, MotionConfig())
    assert (equal.guided_steps, equal.optim_steps, equal.lr) == (c.guided_steps, c.optim_steps, c.lr)
    assert (equal.steps, equal.cfg, equal.negative, equal.block) == (c.steps, c.cfg, c.negative, c.block)
    assert (own.optim_steps, own.lr_over, own.reference) == (authors.optim_steps, authors.lr_over, authors.reference)
    assert own.guidance_fraction == authors.guidance_fraction and own.travel() == pytest.approx(equal.travel())
    assert preset_of(None, name)[1] == authors


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_the_stream_is_what_the_block_before_returns(wan, inputs, recompute):
    x = inputs["noise"].clone().requires_grad_()
    t = torch.tensor(500.0)
    stream = stream_before(wan.dit, 2, x, t, inputs["text"], recompute)
    tokens, _, modulation, text, rope = wan.dit.embed(x, t.reshape(1), inputs["text"])
    expected = wan.dit.blocks[1](wan.dit.blocks[0](tokens, modulation, text, rope), modulation, text, rope)
    assert torch.equal(stream, expected)
    weights = torch.randn_like(stream)
    (ours,) = torch.autograd.grad((stream * weights).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), x)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not wan.dit.blocks[1]._forward_hooks


def test_nothing_enters_block_0(wan, inputs):
    with pytest.raises(UserError, match="block must be at least 1"):
        stream_before(wan.dit, 0, inputs["noise"], torch.tensor(500.0), inputs["text"])


GUIDED = [
    (DiTFlow, DiTFlowConfig(**SMALL, inject=())),
    (SMM, SMMConfig(**SMALL)),
    (MOFT, MOFTConfig(**SMALL)),
    (MotionClone, MotionCloneConfig(**SMALL)),
]


@pytest.mark.parametrize(("kind", "config"), GUIDED)
@pytest.mark.parametrize("reference", ["clean", "noised"])
def test_what_is_read_at_which_level_with_which_text(wan, clip, kind, config, reference):
    """The reference without a prompt, once at t = 0 or at each step's level; the latents with theirs."""
    seen = []

    def note(module, args, output):
        text = "empty" if args[2].shape == empty.shape and torch.equal(args[2], empty) else "prompt"
        if isinstance(output, tuple):
            seen.append((args[1].item(), text, args[0].detach().clone()))

    (empty,) = encode_prompts(wan, [""], CPU)
    handle = wan.dit.register_forward_hook(note)
    transfer(wan, clip, "a ball", replace(config, reference=reference))
    handle.remove()
    scheduler = FlowEuler(4, 3.0)
    expected = [(0.0, "empty")] if reference == "clean" else []
    for t in scheduler.timesteps[:2].tolist():
        expected += ([(t, "empty")] if reference == "noised" else []) + [(t, "prompt")] * 2
    expected += [(0.0, "empty")] * 2  # the flows that are stored
    assert [(t, text) for t, text, _ in seen] == expected
    z_ref = seen[-2][2]
    noise = torch.randn(z_ref.shape, generator=torch.Generator().manual_seed(0))
    for t, latents in [(t, latents) for t, text, latents in seen[:-1] if text == "empty"]:
        sigma = scheduler.sigmas[0].new_tensor(t) / 1000
        assert torch.allclose(latents, (1 - sigma) * z_ref + sigma * noise, atol=1e-6)


def test_motionclone_reads_its_reference_once_at_its_own_level(wan, inputs):
    levels = []
    handle = wan.dit.register_forward_hook(lambda m, args, output: levels.append(args[1].item()))
    guidance = guidance_of(MotionClone, MotionCloneConfig(**SMALL), wan, inputs)
    for t in (900.0, 800.0):
        guidance.target_at(torch.tensor(t / 1000), torch.tensor(t))
    handle.remove()
    assert levels == [pytest.approx(610)]


@pytest.mark.parametrize(("kind", "config"), [*GUIDED, (FlowMotion, FlowMotionConfig(**SMALL))])
def test_the_loss_falls(wan, inputs, kind, config):
    config = replace(config, optim_steps=8, lr=(0.02, 0.01))
    guidance = guidance_of(kind, config, wan, inputs)
    sigma = torch.tensor(0.9)
    with torch.no_grad():
        latents = guidance.before_step(0, inputs["noise"], sigma, 1000 * sigma)
        assert torch.equal(guidance.before_step(2, latents, sigma, 1000 * sigma), latents)
    guidance.close()
    (losses,) = guidance.losses
    assert losses[-1] < losses[0] and guidance.status["loss"]
    report = guidance.report()
    assert len(report["gradient_norms"][0]) == 8 and min(report["gradient_norms"][0]) > 0
    assert report["peer"] == kind.__name__ and not latents.requires_grad


@pytest.mark.parametrize("name", PEERS)
def test_a_whole_run(wan, clip, name):
    config = replace(PEERS[name].config, **SMALL)
    before = []
    result = transfer(wan, clip, "a ball", config, seed=3, on_latents=lambda r: before.append(r.frames))
    assert result.frames.shape == clip.shape and before == [None]
    assert result.flows[0].shape == result.flows[1].shape == (2, 24, 2)
    assert len(result.report["losses"]) == 2
    again = transfer(wan, clip, "a ball", config, seed=3)
    assert torch.equal(again.latents, result.latents)
    plain = fastvmt.transfer(wan, clip, "a ball", MotionConfig(**{**SMALL, "optim_steps": 1, "amf": "none"}), seed=3)
    assert torch.equal(transfer(wan, clip, "a ball", unguided(config), seed=3).latents, plain.latents)
    assert not torch.equal(result.latents, plain.latents)


@pytest.mark.parametrize("name", PEERS)
def test_what_a_run_costs_is_known_before(wan, name):
    config = replace(PEERS[name].config, **SMALL)
    lines = costs(config, wan.dit, (3, 4, 6))
    assert "2 of 4 steps" in lines[0] and "TFLOP" in lines[1]
    gradient = gradient_of(config)
    assert (gradient is None) == (name == "flowmotion") and gradient_of(unguided(config)) is None
    if gradient is not None:
        shape, dtype = (1, 16, 3, 8, 12), torch.float32
        needed = [gradient_bytes(wan.dit.config, dtype, shape, gradient, mode, False) for mode in ("none", "block")]
        assert needed[0] > needed[1] > 0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DiTFlowConfig, {"target": "warm"}, "target must be one of hard, soft"),
        (DiTFlowConfig, {"inject": (-1,)}, "inject must be at least 0"),
        (SMMConfig, {"variant": "x"}, "variant must be one of mended, published, ditflow"),
        (MOFTConfig, {"channels": 0.0}, "channels must be above 0"),
        (MotionCloneConfig, {"update": "sgd"}, "update must be one of adam, score"),
        (MOFTConfig, {"reference": "once"}, "reference must be one of clean, noised"),
        (FlowMotionConfig, {"velocity": "never"}, "velocity must be one of update, step"),
        (SMMConfig, {"lr_over": "days"}, "lr_over must be one of steps, updates"),
    ],
)
def test_options_that_make_no_sense_are_refused(kind, options, message):
    with pytest.raises(UserError, match=message):
        kind(**options)
