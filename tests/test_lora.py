"""Adapters on slices of heads, and temporal positions that are real numbers."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from wan_mini.config import DiTConfig
from wan_mini.device.offload import on_device
from wan_mini.dit import EPS, WanDiT
from wan_mini.errors import MissingFile, UserError
from wan_mini.lora import Adapters, attached, head_rows, load_adapters, lora_on, merged, save_adapters

CONFIG = DiTConfig(dim=48, ffn_dim=96, num_heads=4, num_layers=3, freq_dim=32, text_dim=16, text_len=8)
HEADS = [torch.tensor(row, dtype=torch.bool) for row in ([1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0])]
T = torch.tensor([700.0])
BASE = ["a" * 64, "b" * 64]


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(1)
    model = WanDiT(CONFIG).requires_grad_(False).eval()
    for block in model.blocks:  # random gains: a permutation of heads must carry them along
        block.self_attn.norm_q.weight.copy_(torch.rand(48) + 0.5)
        block.self_attn.norm_k.weight.copy_(torch.rand(48) + 0.5)
    return model


@pytest.fixture
def inputs():
    return torch.randn(1, 16, 3, 8, 12), T, torch.randn(1, 5, 16)


def with_random_b(adapters: Adapters, scale: float = 0.3) -> Adapters:
    for lora in adapters.values():
        torch.nn.init.normal_(lora.B, std=scale)
    return adapters


def near(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


# Temporal positions.


def test_default_times_are_the_frame_numbers(dit, inputs):
    base = dit(*inputs)
    assert torch.equal(base, dit(*inputs, times=range(3))) and torch.equal(base, dit(*inputs, times=[0.0, 1.0, 2.0]))
    near(dit(*inputs, times=[7.5, 8.5, 9.5]), base, 1e-5)  # RoPE sees distances only
    assert (dit(*inputs, times=[0, 2, 4]) - base).abs().max() > 1e-4
    q, k = dit(*inputs, qk_block=1, times=[0, 2, 4])
    assert not torch.equal(q, dit(*inputs, qk_block=1)[0])
    with pytest.raises(UserError, match="position for each of the 3 latent frames, got 2"):
        dit(*inputs, times=[0, 1])


# Adapters.


def test_only_chosen_heads_have_adapters(dit):
    adapters = lora_on(dit, HEADS, rank=4)
    assert sorted(adapters) == [f"{b}_{t}" for b in (0, 2) for t in "koqv"]  # block 1 has no chosen head
    rows = head_rows(HEADS[0], 12)
    assert rows.sum() == 24 and rows[:12].all() and not rows[12:36].any()
    assert torch.equal(adapters["0_q"].rows.bool(), rows) and adapters["0_q"].columns.all()
    assert torch.equal(adapters["0_o"].columns.bool(), rows) and adapters["0_o"].rows.all()
    assert sorted(lora_on(dit, HEADS, rank=4, targets="v")) == ["0_v", "2_v"]
    for targets in ("", "qx"):
        with pytest.raises(UserError, match="targets must be some of qkvo"):
            lora_on(dit, HEADS, rank=4, targets=targets)
    with pytest.raises(UserError, match="each of 3 blocks, got 2"):
        lora_on(dit, HEADS[:2], rank=4)


def test_new_adapters_change_nothing_and_only_b_has_a_gradient(dit, inputs):
    adapters = lora_on(dit, HEADS, rank=4)
    with attached(dit, adapters):
        velocity = dit(*inputs)
        velocity.square().mean().backward()
    assert torch.equal(velocity, dit(*inputs))
    for lora in adapters.values():
        assert not lora.A.grad.any() and lora.B.grad.any()


def test_seeds_and_gain(dit):
    one, again, other = (lora_on(dit, HEADS, rank=4, seed=seed)["0_q"].A for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    x = torch.randn(5, 48)
    plain, doubled = (with_random_b(lora_on(dit, HEADS, rank=4, alpha=alpha))["0_q"] for alpha in (None, 8))
    doubled.load_state_dict(plain.state_dict())
    near(doubled(x), 2 * plain(x))
    near(plain(x), x @ plain.delta().mT)


def test_merged_is_attached_and_comes_off_again(dit, inputs):
    adapters = with_random_b(lora_on(dit, HEADS, rank=4))
    before = copy.deepcopy(dit.state_dict())
    base = dit(*inputs)
    for strength in (1.0, 0.5):
        adapters.set_strength(strength)
        with attached(dit, adapters):
            hooked = dit(*inputs)
        with merged(dit, adapters):
            near(dit(*inputs), hooked)
            assert not torch.equal(dit.blocks[0].self_attn.q.weight, before["blocks.0.self_attn.q.weight"])
        assert (hooked - base).abs().max() > 1e-3
        assert all(torch.equal(weight, before[name]) for name, weight in dit.state_dict().items())
    half = 0.5 * adapters["0_q"].gain * adapters["0_q"].B @ adapters["0_q"].A
    near(adapters["0_q"].delta(), half * adapters["0_q"].rows[:, None])
    adapters.set_strength(0.0)
    with attached(dit, adapters):
        assert torch.equal(dit(*inputs), base)
    assert torch.equal(dit(*inputs), base)  # hooks are gone


def test_two_adapters_add_up_and_an_error_takes_them_off(dit, inputs):
    one, two = (with_random_b(lora_on(dit, HEADS, rank=4, seed=seed)) for seed in (1, 2))
    with attached(dit, one, two):
        hooked = dit(*inputs)
    with merged(dit, one, two):
        near(dit(*inputs), hooked)
    base = dit(*inputs)
    with pytest.raises(ZeroDivisionError), attached(dit, one), merged(dit, two):
        raise ZeroDivisionError
    assert torch.equal(dit(*inputs), base)


def test_bfloat16_weights_are_not_merged_into(dit, inputs):
    rounded = copy.deepcopy(dit)
    rounded.blocks.bfloat16()
    adapters = with_random_b(lora_on(dit, HEADS, rank=4))
    with pytest.raises(UserError, match="float32 weights only, got torch.bfloat16"), merged(rounded, adapters):
        rounded(*inputs)
    x = torch.randn(1, 7, 48, dtype=torch.bfloat16)
    with attached(rounded, adapters):
        assert rounded.blocks[0].self_attn.q(x).dtype == torch.bfloat16


def test_other_heads_stay_where_they_are(dit, inputs):
    """Rows and columns of other heads get no gradient, and weight decay does not move what is zero."""
    adapters = lora_on(dit, HEADS, rank=4)
    frozen = with_random_b(lora_on(dit, [~heads for heads in HEADS], rank=4)).requires_grad_(False)
    start = copy.deepcopy(adapters.state_dict())
    known = copy.deepcopy(frozen.state_dict())
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.1, weight_decay=0.99)
    for _ in range(2):
        with attached(dit, frozen, adapters):
            dit(*inputs).square().mean().backward()
        for name, lora in adapters.items():
            if name.endswith("o"):
                assert not lora.A.grad[:, ~lora.columns.bool()].any()
            else:
                assert not lora.B.grad[~lora.rows.bool()].any()
        optimizer.step()
        optimizer.zero_grad()
    for name, lora in adapters.items():
        if not name.endswith("o"):
            assert not lora.B[~lora.rows.bool()].any()
        assert not torch.equal(lora.B, start[f"{name}.B"])
    assert all(weight.grad is None for weight in [*dit.parameters(), *frozen.parameters()])
    assert all(torch.equal(weight, known[name]) for name, weight in frozen.state_dict().items())


def test_the_joint_norm_couples_the_heads(dit):
    """An untouched head's raw q stays to the bit; its norm is that of all heads together."""
    attention, adapters = dit.blocks[0].self_attn, with_random_b(lora_on(dit, HEADS, rank=4))
    x, other = torch.randn(1, 20, 48), ~head_rows(HEADS[0], 12)
    raw, normed = attention.q(x), attention.norm_q(attention.q(x))
    with attached(dit, adapters):
        raw_now, normed_now = attention.q(x), attention.norm_q(attention.q(x))
    assert torch.equal(raw_now[..., other], raw[..., other]) and not torch.equal(raw_now, raw)
    old, new = (r.square().mean(-1, keepdim=True) for r in (raw, raw_now))
    near(normed_now[..., other], normed[..., other] * ((old + EPS) / (new + EPS)).sqrt())


def test_heads_are_permuted_with_their_gains(dit, inputs):
    """Rows and biases of q, k, v, the norms' gains and the columns of o go together; without the gains it is wrong."""
    order = torch.tensor([2, 0, 3, 1])
    channels = (order[:, None] * 12 + torch.arange(12)).flatten()
    for gains, equal in ((True, True), (False, False)):
        permuted = copy.deepcopy(dit)
        for block in permuted.blocks:
            a = block.self_attn
            for linear in (a.q, a.k, a.v):
                linear.weight.copy_(linear.weight[channels].clone())
                linear.bias.copy_(linear.bias[channels].clone())
            a.o.weight.copy_(a.o.weight[:, channels].clone())
            if gains:
                for norm in (a.norm_q, a.norm_k):
                    norm.weight.copy_(norm.weight[channels].clone())
        difference = (permuted(*inputs) - dit(*inputs)).abs().max()
        assert (difference < 1e-5) == equal


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputed_and_offloaded_blocks_have_their_adapters(dit, inputs, recompute):
    model = copy.deepcopy(dit)
    adapters = with_random_b(lora_on(dit, HEADS, rank=4))
    gradients = []
    for offload, policy in ((False, "none"), (True, recompute)):
        with on_device(model, torch.device("cpu"), offload_blocks=offload), attached(model, adapters):
            loss = model(*inputs, recompute=policy).square().mean()
            gradients.append(torch.autograd.grad(loss, list(adapters.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert torch.equal(model(*inputs), dit(*inputs))


# Files.


def test_a_file_gives_the_adapters_back(dit, tmp_path):
    adapters = with_random_b(lora_on(dit, HEADS, rank=4))
    file = tmp_path / "new" / "adapters.safetensors"
    save_adapters(file, adapters, {"method": "fym", "heads": [[1, 0]]}, BASE)
    tensors, settings = load_adapters(file, BASE[::-1])  # of files in any order
    assert settings == {"method": "fym", "heads": [[1, 0]]}
    assert tensors.keys() == adapters.state_dict().keys()
    assert all(torch.equal(tensors[name], weight) for name, weight in adapters.state_dict().items())
    with pytest.raises(UserError, match="was trained beside other weights than these: give --model"):
        load_adapters(file, [BASE[0], "c" * 64])
    with pytest.raises(MissingFile, match="does not exist: give a file that --save has written"):
        load_adapters(tmp_path / "none", BASE)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"x": torch.ones(1)}, tmp_path / "base.safetensors", {"settings": "{}", "base": "no JSON"})
    for name in ("other", "text", "base"):
        with pytest.raises(UserError, match="holds no adapters"):
            load_adapters(tmp_path / f"{name}.safetensors", BASE)
    with pytest.raises(UserError, match="hash_files=True"):
        save_adapters(file, adapters, {}, [])
