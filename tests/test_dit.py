"""The diffusion transformer against the official code's golden file, and its own invariants."""

from copy import deepcopy

import pytest
import torch
from conftest import error, golden, weights

from wan_mini import attention as attention_module
from wan_mini.config import TINY, DiTConfig
from wan_mini.device.select import compile_blocks
from wan_mini.dit import RECOMPUTE, WanDiT, apply_rope, attention, keeps_float32, rope_table, timestep_embedding
from wan_mini.errors import UserError

SMALL = DiTConfig(dim=48, ffn_dim=64, num_heads=3, num_layers=4, freq_dim=32, text_dim=10, text_len=6)


def small_inputs(batch=1):
    return torch.randn(batch, 16, 3, 6, 10), torch.linspace(300, 900, batch), torch.randn(batch, 4, 10)


def bf16(model: WanDiT) -> WanDiT:
    """The model as load.py makes it for bfloat16."""
    for name, parameter in model.named_parameters():
        if not keeps_float32(name):
            parameter.data = parameter.data.bfloat16()
    return model


@torch.no_grad()
def test_equals_the_official_code():
    data = golden("dit")
    model = WanDiT(DiTConfig(dim=128, ffn_dim=256, num_heads=4, num_layers=3, text_dim=48, text_len=16))
    model.load_state_dict(weights(data))
    inputs = data["in/latents"], data["in/timestep"], data["in/context"]
    q, k = model(*inputs, qk_block=1)
    assert error(model(*inputs), data["out/velocity"]) < 1e-5
    assert error(q, data["out/q"]) < 1e-5
    assert error(k, data["out/k"]) < 1e-5


@pytest.mark.parametrize("block", [0, 2, 3])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_stopping_at_a_block_equals_the_whole_model(block, recompute):
    """Values, and the latents' gradient, equal those of a full forward whose block is watched by a hook."""
    model = WanDiT(SMALL).requires_grad_(False)
    latents, timestep, text = small_inputs()
    latents.requires_grad_()
    seen = {}

    def watch(module, args, kwargs):
        x = args[0]
        seen["qk"] = module.qk(x, x, kwargs["rope"])

    model.blocks[block].self_attn.register_forward_pre_hook(watch, with_kwargs=True)
    model(latents, timestep, text)
    grads = []
    for q, k in (seen["qk"], model(latents, timestep, text, qk_block=block, recompute=recompute)):
        grads.append((q, k, *torch.autograd.grad((q * k.roll(1, 1)).sum(), latents)))
    for whole, cut in zip(*grads):
        assert torch.equal(whole, cut)


def test_nothing_behind_the_block_runs():
    model = WanDiT(SMALL)
    for block in model.blocks[2:]:
        block.register_forward_pre_hook(lambda *_: pytest.fail("a later block ran"))
    for part in (model.head, model.blocks[2].self_attn.v, model.blocks[2].self_attn.o, model.blocks[2].ffn):
        part.register_forward_pre_hook(lambda *_: pytest.fail("more than q and k ran"))
    q, k = model(*small_inputs(), qk_block=2)
    assert q.shape == k.shape == (1, 3 * 3 * 5, 3, 16)


@torch.no_grad()
def test_tokens_are_in_raster_order():
    """Put each latent's row and column into two channels: token n must hold those of its own patch."""
    f, h, w = 2, 3, 5
    model = WanDiT(SMALL)
    rows, columns = torch.meshgrid(torch.arange(2.0 * h), torch.arange(2.0 * w), indexing="ij")
    latents = torch.zeros(1, 16, f, 2 * h, 2 * w)
    latents[0, 0], latents[0, 1], latents[0, 2] = rows, columns, torch.arange(f).reshape(f, 1, 1)
    model.patch_embedding.weight.zero_()
    model.patch_embedding.bias.zero_()
    for channel in range(3):
        model.patch_embedding.weight[channel, channel] = 0.25
    tokens = model.patch_embedding(latents).flatten(2).transpose(1, 2)[0, :, :3]
    n = torch.arange(f * h * w)
    expected = torch.stack([2 * (n // w % h) + 0.5, 2 * (n % w) + 0.5, n // (h * w)], dim=1)
    torch.testing.assert_close(tokens, expected)


def test_unpatchify_inverts_patchify():
    model = WanDiT(SMALL)
    latents = torch.randn(2, 16, 3, 6, 10)
    patches = latents.reshape(2, 16, 3, 3, 2, 5, 2).permute(0, 2, 3, 5, 4, 6, 1).reshape(2, 45, 64)
    assert torch.equal(model.unpatchify(patches, (3, 3, 5)), latents)


@torch.no_grad()
def test_rope_depends_on_relative_position_only():
    cos, sin = rope_table((4, 5, 6), 16, torch.device("cpu"))
    assert cos.shape == (120, 1, 8)
    q, k = torch.randn(2, 16)
    here, there = (apply_rope(x.expand(1, 120, 1, 16), (cos, sin)).reshape(4, 5, 6, 16) for x in (q, k))
    products = [(here[a, b, c] * there[a + 1, b + 2, c - 1]).sum() for a, b, c in ((0, 0, 1), (2, 2, 5), (1, 1, 3))]
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(products[0], products[2])
    torch.testing.assert_close(here.norm(dim=-1), q.norm().expand(4, 5, 6))


@pytest.mark.parametrize("width", [16, 24, 48, 128])
def test_rope_is_a_product_of_complex_numbers(width):
    """Both forms of apply_rope, in value and gradient. Where a CPU fuses product and sum, the last bit may differ."""
    x, rope = torch.randn(2, 60, 3, width, requires_grad=True), rope_table((3, 4, 5), width, torch.device("cpu"))
    cos, sin = rope
    first, second = x[..., 0::2], x[..., 1::2]
    expected = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    probe = torch.randn_like(x)
    rotated = apply_rope(x, rope)
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-6)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, probe) for y in (rotated, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert apply_rope(x.to("meta"), (cos.to("meta"), sin.to("meta"))).shape == x.shape  # what runs elsewhere


@torch.no_grad()
def test_a_batch_is_its_rows_and_padding_is_zeros():
    model = WanDiT(SMALL)
    latents, timestep, text = small_inputs(batch=2)
    both = model(latents, timestep, text)
    for n in range(2):
        padded = torch.cat([text[n : n + 1], torch.zeros(1, 2, 10)], dim=1)
        one = model(latents[n : n + 1], timestep[n : n + 1], padded)
        torch.testing.assert_close(both[n : n + 1], one, rtol=1e-4, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 0.01


@torch.no_grad()
def test_bfloat16_keeps_some_parts_in_float32_and_stays_close():
    model = WanDiT(TINY)
    inputs = torch.randn(1, 16, 2, 8, 8), torch.tensor([637.0]), torch.randn(1, 9, 64)
    expected = model(*inputs)
    q_expected, _ = model(*inputs, qk_block=3)
    model = bf16(model)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["blocks.0.ffn.0.weight"] == dtypes["patch_embedding.weight"] == torch.bfloat16
    assert dtypes["blocks.0.modulation"] == dtypes["time_embedding.0.weight"] == torch.float32
    stream = []
    model.blocks[-1].register_forward_hook(lambda *args: stream.append(args[-1].dtype))
    got, (q, _) = model(*inputs), model(*inputs, qk_block=3)
    assert stream == [torch.float32] and got.dtype == q.dtype == torch.float32
    assert 1e-5 < error(got, expected) < 0.03
    assert 1e-5 < error(q, q_expected) < 0.03


def test_which_parameters_stay_float32():
    """By whole names: all of the time MLP and the head, each modulation, each norm; and nothing else."""
    names = [name for name, _ in WanDiT(SMALL).named_parameters()]
    kept = {name.removeprefix("blocks.1.") for name in names if keeps_float32(name) and not name.startswith("blocks.0")}
    assert {name for name in kept if not name.startswith("blocks.")} == {
        *(f"time_embedding.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")),
        *("time_projection.1.weight", "time_projection.1.bias"),
        *("head.modulation", "head.head.weight", "head.head.bias"),
        *("modulation", "norm3.weight", "norm3.bias"),
        *(f"{layer}.{norm}.weight" for layer in ("self_attn", "cross_attn") for norm in ("norm_q", "norm_k")),
    }
    assert not keeps_float32("blocks.0.ffn.0.weight") and not keeps_float32("text_embedding.0.weight")


@torch.no_grad()
def test_a_timestep_of_float32_differs_from_its_bfloat16():
    """The published code rounds 954 to 952: that changes the velocity, where a bfloat16 time MLP hardly does."""
    model = WanDiT(TINY)
    latents, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 9, 64)
    timestep = torch.tensor([954.0])
    assert timestep.bfloat16() == 952
    embedded = [model.embed(latents, t, text).time for t in (timestep, timestep.bfloat16().float())]
    rounded = deepcopy(model)
    rounded.time_embedding.bfloat16()
    rough = rounded.time_embedding(timestep_embedding(timestep, 256).bfloat16()).float()
    assert error(embedded[1], embedded[0]) > 0.1
    assert error(rough, embedded[0]) < 0.02


@torch.no_grad()
def test_attention_can_be_replaced():
    """In every layer, for all later passes, and back; the state dict does not know."""
    model, inputs = WanDiT(SMALL), small_inputs()
    expected, names, calls = model(*inputs), list(model.state_dict()), []

    def counted(q, k, v):
        calls.append((q.shape, k.shape))
        return attention(q, k, v)

    model.set_attention(counted)
    assert torch.equal(model(*inputs), expected)
    assert calls == [((1, 45, 3, 16), (1, 45, 3, 16)), ((1, 45, 3, 16), (1, 6, 3, 16))] * SMALL.num_layers
    assert list(model.state_dict()) == names
    model.set_attention(lambda q, k, v: torch.zeros_like(q).flatten(2))
    assert not torch.equal(model(*inputs), expected)
    model.set_attention(attention)
    assert torch.equal(model(*inputs), expected)


@pytest.mark.parametrize("length", [45, 6])
def test_attention_in_bfloat16_on_a_cpu(length, monkeypatch):
    """With a gradient it is two products, up to a number of logits; without, or in float32, PyTorch's kernel."""
    q, k, v = (torch.randn(2, n, 3, 16, dtype=torch.bfloat16, requires_grad=True) for n in (45, length, length))
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(*inputs):
        calls.append(inputs)
        return kernel(*inputs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    out = attention(q, k, v)
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert not calls
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = attention(*exact)
    assert len(calls) == 1 and error(out.float(), expected) < 0.02
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), exact)):
        assert error(ours.float(), theirs) < 0.04
    with torch.no_grad():
        assert error(attention(q, k, v).float(), expected) < 0.02
    assert len(calls) == 2
    monkeypatch.setattr(attention_module, "PLAIN_LOGITS", 2 * 45 * 3 * length - 1)
    attention(q, k, v)
    assert len(calls) == 3


def test_blocks_share_compiled_code():
    """One graph without gradients and one with, whatever the block, the timestep and what is recomputed."""
    torch._dynamo.reset()  # it counts compilations in the whole process
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain, (x, _, text) = WanDiT(SMALL).requires_grad_(False), small_inputs()
    compiled = deepcopy(plain)
    compile_blocks(compiled, backend=backend)
    for timestep in (torch.tensor([900.0]), torch.tensor([100.0])):
        with torch.no_grad():
            assert torch.equal(compiled(x, timestep, text), plain(x, timestep, text))
        for recompute in RECOMPUTE:
            gradients = []
            for dit in (compiled, plain):
                y = x.clone().requires_grad_()
                gradients.append(torch.autograd.grad(dit(y, timestep, text, recompute=recompute).square().sum(), y)[0])
            assert torch.equal(*gradients)
    assert len(graphs) == 2


def test_errors_name_what_is_expected():
    model = WanDiT(SMALL)
    latents, timestep, text = small_inputs()
    with pytest.raises(UserError, match=r"\(B, 16, F, H, W\) .* divisible by \(1, 2, 2\), got \(1, 16, 3, 5, 10\)"):
        model(latents[..., :5, :], timestep, text)
    with pytest.raises(UserError, match=r"got \(1, 8, 3, 6, 10\)"):
        model(latents[:, :8], timestep, text)
    with pytest.raises(UserError, match=r"qk_block must be in 0..3, got 4"):
        model(latents, timestep, text, qk_block=4)
    with pytest.raises(UserError, match=r"recompute must be one of none, selective, block, got all"):
        model(latents, timestep, text, recompute="all")
    with pytest.raises(UserError, match=r"text must be \(B, L <= 6, 10\), got \(1, 7, 10\)"):
        model(latents, timestep, torch.randn(1, 7, 10))
    with pytest.raises(UserError, match="heads of even width, got 50 / 4"):
        DiTConfig(dim=50, ffn_dim=8, num_heads=4, num_layers=1)
