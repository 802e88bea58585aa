"""Follow-Your-Motion: labels and losses in closed form, and that its stages train what they should."""

import math
from dataclasses import replace

import pytest
import torch

from wan_mini.config import DiTConfig
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.lora import attached
from wan_mini.peers import heads
from wan_mini.peers.fit import Fit, Prediction, denoising_loss
from wan_mini.peers.followyourmotion import (
    FollowYourMotionConfig,
    frame_difference_loss,
    frame_sets,
    label_heads,
    motion_loss,
    plan,
    rope_times,
    sparse_frames,
)
from wan_mini.peers.heads import band_masks, exact_masks, mask_similarity, relabel, similarities, temporal_heads

CONFIG = DiTConfig(dim=48, ffn_dim=96, num_heads=4, num_layers=3, freq_dim=32, text_dim=16, text_len=8)
GRID = (4, 2, 3)
FRAMES, SIZE = 4, 6
TOKENS = FRAMES * SIZE
SMALL = FollowYourMotionConfig(fit_steps=(2, 2), fit_lr=(1e-2, 1e-2), rank=4, stride=2)


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(3)
    return WanDiT(CONFIG).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def text():
    return torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def clips():
    whole = torch.randn(1, 16, 5, 4, 6, generator=torch.Generator().manual_seed(4))
    stills = [whole[:, :, i : i + 1] for i in range(5)]
    return {"whole": [whole], "spatial": stills, "temporal": [whole[:, :, ::2]]}


# Labels.


def codes(groups):
    """q = k whose softmax is uniform over the tokens of one's own group: (N,1,D)."""
    one_hot = torch.nn.functional.one_hot(groups).float()
    x = one_hot * math.sqrt(100.0 * math.sqrt(one_hot.shape[1]))
    return x[:, None]


def test_maps_in_closed_form():
    tokens = torch.arange(TOKENS)
    frame, position, one = codes(tokens // SIZE), codes(tokens % SIZE), torch.zeros(TOKENS, 1, 4)
    for x, expected in (
        (frame, (1.0, TOKENS**-0.5)),
        (position, (TOKENS**-0.5, 1.0)),
        (one, (FRAMES**-0.5, SIZE**-0.5)),
    ):
        got = mask_similarity(x, x, GRID, exact_masks)
        torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64), rtol=1e-5, atol=1e-5)
    uniform = mask_similarity(one, one, GRID, band_masks)[0]
    assert uniform[0] == pytest.approx(uniform[1].item())
    sims = uniform[None, None]
    assert temporal_heads(sims, 1.3, "paper").all() and not temporal_heads(sims, 1.3, "release").any()


def test_bands_have_equal_areas_and_swap_with_the_numbering():
    spatial, temporal = band_masks(torch.arange(TOKENS), GRID)
    area = TOKENS * (2 * SIZE + 1) - SIZE * (SIZE + 1)
    assert spatial.sum() == temporal.sum() == area
    by_position = torch.arange(TOKENS) % SIZE * FRAMES + torch.arange(TOKENS) // SIZE
    assert torch.equal(temporal, spatial[by_position][:, by_position])
    assert not torch.equal(temporal, spatial)


def test_a_map_in_chunks_is_the_whole_map():
    q, k = torch.randn(TOKENS, 3, 8), torch.randn(TOKENS, 3, 8)
    maps = (q.transpose(0, 1) @ k.permute(1, 2, 0) / 8**0.5).softmax(-1).double()
    for masks in (band_masks, exact_masks):
        expected = []
        for mask in masks(torch.arange(TOKENS), GRID):
            expected.append((maps * mask).sum((1, 2)) / (maps.square().sum((1, 2)) * mask.sum()).sqrt())
        for rows in (5, TOKENS):
            torch.testing.assert_close(
                mask_similarity(q, k, GRID, masks, rows), torch.stack(expected, 1), rtol=1e-6, atol=0
            )


def test_one_pass_sees_each_blocks_queries_and_keys(dit, text, clips):
    x, t = clips["whole"][0], torch.tensor([900.0])
    before = dit(x, t, text)
    sims = similarities(dit, x, t, text)
    assert sims.shape == (3, 4, 2)
    for block in range(3):
        q, k = dit(x, t, text, qk_block=block)
        torch.testing.assert_close(sims[block], mask_similarity(q[0], k[0], dit.grid(x)))
    assert torch.equal(dit(x, t, text), before)  # hooks are gone
    noised = 0.1 * x + 0.9 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(label_heads(dit, x, text, SMALL, 7), similarities(dit, noised, t, text))
    exact = label_heads(dit, x, text, replace(SMALL, mask="exact"), 7)
    torch.testing.assert_close(exact, similarities(dit, noised, t, text, exact_masks))


def test_rules_and_controls():
    sims = torch.tensor([[[1.0, 1.0], [1.31, 1.0], [1.0, 1.31], [2.0, 1.0]]])
    paper, release = (temporal_heads(sims, 1.3, rule) for rule in ("paper", "release"))
    assert paper.tolist() == [[True, False, True, False]] and release.tolist() == [[False, False, True, False]]
    assert temporal_heads(sims, 1.32, "paper").tolist() == [[True, True, True, False]]
    with pytest.raises(UserError, match="rule must be one of paper, release"):
        temporal_heads(sims, 1.3, "mine")
    labels = torch.rand(6, 4) < 0.3
    spatial, temporal = relabel(labels, "labeled", 0)
    assert torch.equal(temporal, labels) and torch.equal(spatial, ~labels)
    spatial, temporal = relabel(labels, "swapped", 0)
    assert torch.equal(temporal, ~labels) and torch.equal(spatial, labels)
    assert all(chosen.all() for chosen in relabel(labels, "all", 0))
    drawn = [relabel(labels, "random", seed) for seed in (1, 1, 2)]
    for spatial, temporal in drawn:
        assert temporal.sum() == labels.sum() and torch.equal(spatial, ~temporal)
        assert not torch.equal(temporal, labels)
    assert torch.equal(drawn[0][1], drawn[1][1]) and not torch.equal(drawn[0][1], drawn[2][1])


# Sparse clips and their positions.


def test_sparse_frames():
    assert list(sparse_frames(81, 5)) == [*range(0, 81, 5)] and len(sparse_frames(81, 5)) == 17
    assert list(sparse_frames(33, 2)) == [*range(0, 33, 2)]
    for frames, stride in ((81, 3), (81, 10 * 3), (33, 5), (81, 8)):  # 8 leaves 11 frames, which are not 4m+1
        with pytest.raises(UserError, match=f"must leave 4m.1 of {frames} frames, got {stride}: try 1, 2,"):
            sparse_frames(frames, stride)


def test_positions_of_sparse_frames():
    assert rope_times(21, 5, "aligned") == (0, 5, 10, 15, 20)
    assert rope_times(21, 5, "paper") == pytest.approx((0, 4.2, 8.4, 12.6, 16.8))
    assert rope_times(21, 5, "none") == (0, 1, 2, 3, 4)
    centered = [21 / 2 + 21 / 5 * (i - 5 / 2) for i in range(5)]  # the paper's form
    assert rope_times(21, 5, "paper") == pytest.approx(centered)
    for kind in ("aligned", "paper", "none"):
        assert rope_times(9, 9, kind) == tuple(range(9)) and rope_times(1, 1, kind) == (0,)


def test_frames_of_the_training_clips():
    still = [[i] for i in range(33)]
    for sparse, expected in (("frames", range(0, 33, 2)), ("latents", range(33)), ("none", range(33))):
        sets = frame_sets(replace(SMALL, sparse=sparse), 33)
        assert [list(clip) for clip in sets["spatial"]] == still
        assert [list(clip) for clip in sets["temporal"]] == [list(expected)]
    for sparse in ("frames", "latents"):
        with pytest.raises(UserError, match="stride must leave"):
            frame_sets(replace(SMALL, sparse=sparse, stride=5), 33)


# The loss.


def test_frame_differences_in_closed_form():
    v = torch.randn(1, 16, 5, 4, 4, dtype=torch.float64)
    for kind, negated in (("paper", 2.0), ("release", 0.0)):
        assert frame_difference_loss(v, v, kind=kind).item() == pytest.approx(0, abs=1e-9)
        assert frame_difference_loss(-v, v, kind=kind).item() == pytest.approx(negated, abs=1e-9)
        still = torch.randn(1, 16, 1, 4, 4, dtype=torch.float64)
        w = torch.randn_like(v)
        assert frame_difference_loss(w + still, v, kind=kind).item() == pytest.approx(
            frame_difference_loss(w, v, kind=kind).item(), abs=1e-9
        )
        assert frame_difference_loss(w[:, :, :1], v[:, :, :1], kind=kind) == 0
    w = torch.randn_like(v)
    by_hand = []
    for i in range(1, 5):
        a, b = (x[0, :, i] - x[0, :, i - 1] for x in (w, v))
        by_hand.append(1 - (a * b).sum() / (a.norm() * b.norm()))
    assert frame_difference_loss(w, v).item() == pytest.approx(torch.stack(by_hand).mean().item())


@pytest.mark.parametrize(("changes", "floor"), [(2, 1 - 8 / math.pi**2), (4, 1 - 64 / (9 * math.pi**2))])
def test_random_predictions_please_the_releases_loss(changes, floor):
    """Independent changes, in the closed form 1 - n G(n/2)^2 / (pi G((n+1)/2)^2)."""
    drawn = [torch.randn(1, 1, changes, 100, 200).cumsum(2) for _ in range(2)]
    start = torch.zeros(1, 1, 1, 100, 200)
    v, w = (torch.cat([start, x], dim=2) for x in drawn)
    assert frame_difference_loss(v, w, kind="release").item() == pytest.approx(floor, abs=0.01)
    n = changes
    assert floor == pytest.approx(1 - n * math.gamma(n / 2) ** 2 / (math.pi * math.gamma((n + 1) / 2) ** 2))


def test_the_loss_is_denoising_and_motion():
    v, target, noised = (torch.randn(1, 16, 3, 4, 4) for _ in range(3))
    prediction = Prediction(v, target, noised, 0.8, None)
    plain = denoising_loss(prediction)
    assert motion_loss(prediction, "none") == plain
    for kind in ("paper", "release"):
        assert motion_loss(prediction, kind) == plain + frame_difference_loss(v, target, kind=kind)
    clean, predicted = noised - 0.8 * target, noised - 0.8 * v
    assert motion_loss(prediction, "clean") == plain + frame_difference_loss(predicted, clean)
    mirrored = Prediction((noised + clean) / 0.8, target, noised, 0.8, None)  # predicts the negative of the clean clip
    assert (motion_loss(mirrored, "clean") - denoising_loss(mirrored)).item() == pytest.approx(2, abs=1e-5)


# The stages.


def half(seed=0):
    labels = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]])  # block 1 has no temporal head
    return {"spatial_heads": (1 - labels).tolist(), "temporal_heads": labels.tolist()}


def test_stages_train_their_own_heads(dit, text, clips):
    p = plan(dit, clips, text, SMALL, 0, half())
    assert [(s.name, s.steps, s.lr, s.decay) for s in p.stages] == [
        ("spatial", 2, 1e-2, 0.1),
        ("temporal", 2, 1e-2, 0.99),
    ]
    still, moving = (stage.passes[0] for stage in p.stages)
    assert still.clips == clips["spatial"] and still.loss is denoising_loss and still.times is None
    assert still.trained is p.parts["spatial"] and not still.frozen
    assert moving.trained is p.parts["temporal"] and moving.frozen == (p.parts["spatial"],)
    assert moving.times == (0, 2, 4) and moving.clips[0].shape[2] == 3
    assert not any(name.startswith("1_") for name in p.parts["temporal"])
    assert len(p.parts["spatial"]) == 12 and len(p.parts["temporal"]) == 8
    log = Fit(p.stages, seed=0).run(dit, text, shift=5.0)
    assert [entry["pass"] for entry in log] == ["spatial"] * 2 + ["temporal"] * 2
    base = dit(clips["whole"][0], torch.tensor([700.0]), text)
    with attached(dit, p.parts["temporal"]):
        assert not torch.equal(dit(clips["whole"][0], torch.tensor([700.0]), text), base)
    assert p.strengths == (0.0, 0.5)


def test_options_reach_the_stages(dit, text, clips):
    for changes, times in (({"rope": "none"}, (0, 1, 2)), ({"rope": "paper"}, tuple(i * 5 / 3 for i in range(3)))):
        assert plan(dit, clips, text, replace(SMALL, **changes), 0, half()).stages[1].passes[0].times == pytest.approx(
            times
        )
    dense = {**clips, "temporal": clips["whole"]}
    assert plan(dit, dense, text, replace(SMALL, sparse="none"), 0, half()).stages[1].passes[0].times == tuple(range(5))
    latents = plan(dit, dense, text, replace(SMALL, sparse="latents"), 0, half()).stages[1].passes[0]
    assert latents.times == (0, 2, 4) and torch.equal(latents.clips[0], clips["whole"][0][:, :, ::2])
    v = torch.randn(1, 16, 3, 4, 4)
    prediction = Prediction(v, -v, v, 0.5, None)
    for motion in ("paper", "release", "clean", "none"):
        loss = plan(dit, clips, text, replace(SMALL, motion=motion), 0, half()).stages[1].passes[0].loss
        assert loss(prediction) == motion_loss(prediction, motion)
    parts = plan(dit, clips, text, replace(SMALL, rank=2, targets="vo"), 0, half()).parts["temporal"]
    assert sorted(parts) == ["0_o", "0_v", "2_o", "2_v"] and parts["0_o"].A.shape == (2, 48)


def test_labels_are_measured_or_taken_over(dit, text, clips):
    p = plan(dit, clips, text, SMALL, 0)
    sims = label_heads(dit, clips["whole"][0], text, SMALL, 0)
    assert p.report["similarities"] == sims.tolist()
    assert p.report["labels"] == temporal_heads(sims).int().tolist() == p.report["temporal_heads"]
    swapped = plan(dit, clips, text, replace(SMALL, heads="swapped"), 0)
    assert swapped.report["labels"] == p.report["labels"] and swapped.report["spatial_heads"] == p.report["labels"]
    again = plan(dit, clips, text, SMALL, 1, p.report)
    assert again.report == p.report and again.parts.state_dict().keys() == p.parts.state_dict().keys()
    undecided = (sims[..., 0] < 1.3 * sims[..., 1]) & (sims[..., 1] < 1.3 * sims[..., 0])
    release = plan(dit, clips, text, replace(SMALL, rule="release"), 0)
    assert undecided.any() and not torch.tensor(release.report["labels"])[undecided].any()


def test_options_are_checked():
    wrong = dict.fromkeys(("heads", "rule", "mask", "sparse", "rope", "motion"), "x")
    wrong |= {"rank": 0, "stride": 0, "ratio": 0.0, "label_timestep": 1001.0, "strengths": (-1.0, 0.0)}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=name):
            replace(SMALL, **{name: value})
    assert heads.MASKS.keys() == {"band", "exact"}


def test_defaults_are_the_papers():
    c = FollowYourMotionConfig()
    assert (c.fit_steps, c.fit_lr, c.fit_decay, c.rank, c.ratio) == ((3000, 2000), (1e-5, 1e-5), (0.1, 0.99), 128, 1.3)
    assert (c.steps, c.cfg, c.strengths, c.stride, len(sparse_frames(81, c.stride))) == (30, 7.0, (0.0, 0.5), 5, 17)
