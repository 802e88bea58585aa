"""Memory that is predicted, beside memory that is used."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.speed.measure import logged_peak
from fastvmt import MotionConfig, gradient_of
from wan_mini.config import DiTConfig, UMT5Config, VAEConfig
from wan_mini.device import memory
from wan_mini.device.memory import MemoryPlan, choose_plan, choose_recompute, estimate, memory_table, sampling_stages
from wan_mini.device.offload import HostBlock
from wan_mini.device.peak import LiveBytesCounter, peak_bytes
from wan_mini.dit import RECOMPUTE, WanDiT
from wan_mini.errors import UserError
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import CausalConv3d, WanVAE

CONFIG = MotionConfig(window=3)
SIZES = {
    "dit": (WanDiT, DiTConfig(dim=96, ffn_dim=192, num_heads=2, num_layers=6, freq_dim=32, text_dim=16, text_len=8)),
    "vae": (WanVAE, VAEConfig(dim=8, num_res_blocks=1)),
    "text_encoder": (UMT5Encoder, UMT5Config(vocab=50, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=3)),
}
SHAPES = {"video_shape": (1, 3, 17, 96, 160), "latent_shape": (1, 16, 5, 12, 20)}
gradient = gradient_of(CONFIG)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def parts(device: str, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    with torch.device(device):
        modules = {name: build(config) for name, (build, config) in SIZES.items()}
    memory.set_weight_dtypes(modules, dtype)
    return modules


def stages(modules: dict[str, nn.Module]) -> dict[str, memory.Stage]:
    return {stage.name: stage for stage in sampling_stages(modules, **SHAPES, gradient=gradient)}


def test_peak_by_hand():
    x = torch.empty(100, device="meta")  # 400 bytes that were there before

    def call():
        a = x + 1  # 400
        b = a.reshape(10, 10).mT  # a view
        c = torch.cat([b, b])  # 1,200
        del a, b  # 800
        return {"one": [c.sum()]}  # 804

    assert peak_bytes(call) == 1200


def test_results_of_every_kind_are_counted():
    """Tuples of tensors, lists of tensors, and results that are written over."""
    x = torch.empty(6, 4, device="meta")
    assert peak_bytes(lambda: x.max(dim=0)) == 4 * 4 + 4 * 8  # values and indices
    assert peak_bytes(lambda: torch.split(x, 2)) == 0  # views
    assert peak_bytes(lambda: torch._foreach_add([x, x], 1.0)) == 2 * 96
    assert peak_bytes(lambda: x.add_(1)) == 0


def test_attention_holds_no_logits_and_only_inside():
    q = torch.empty(1, 2, 64, 8, device="meta", requires_grad=True)

    def call():
        out = F.scaled_dot_product_attention(q, q, q)
        return torch.autograd.grad(out.sum(), q)

    tensor = q.nbytes
    assert peak_bytes(call) < 10 * tensor
    with LiveBytesCounter() as counter:  # without the exchange
        call()
    assert counter.peak > 2 * 64 * 64 * 4  # logits of both heads


@pytest.mark.parametrize(
    ("stage", "recompute"),
    [("encode", "none"), ("decode", "none"), ("denoise", "none"), *(("guide", policy) for policy in RECOMPUTE)],
)
def test_what_is_predicted_is_what_is_used(stage, recompute, monkeypatch):
    """On a CPU, but for what its convolutions take for themselves: they are replaced by their result's shape."""

    def empty_result(conv, x, weight, *_):
        convolution = F.conv3d if x.ndim == 5 else F.conv2d
        return x.new_zeros(convolution(x.to("meta"), weight.to("meta"), None, conv.stride, conv.padding).shape)

    monkeypatch.setattr(CausalConv3d, "convolve", empty_result)
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", empty_result)
    used = stages(parts("cpu"))[stage]
    predicted = stages(parts("meta"))[stage]
    with torch.no_grad():
        used_bytes = logged_peak(lambda: used.run(recompute))
        predicted_bytes = peak_bytes(lambda: predicted.run(recompute))
    assert predicted_bytes == pytest.approx(used_bytes, rel=0.1)


def test_estimate_covers_every_way():
    modules = parts("meta", torch.bfloat16)
    plans = estimate(modules, dtype=torch.bfloat16, **SHAPES, gradient=gradient)
    ways = [(plan.offload, plan.recompute) for plan in plans]
    assert ways == [(o, r) for o in ("none", "parts") for r in RECOMPUTE] + [("blocks", r) for r in RECOMPUTE[1:]]
    for plan in plans:
        assert list(plan.stages) == ["text", "encode", "guide", "denoise", "decode"]
    assert plans[0].stages["guide"] > plans[1].stages["guide"] > plans[2].stages["guide"]
    all_weights = sum(memory.module_bytes(module) for module in modules.values()) / 1e9
    dit_weights = memory.module_bytes(modules["dit"]) / 1e9
    away = plans[0].stages["denoise"] - plans[3].stages["denoise"]
    assert away == pytest.approx(all_weights - dit_weights)
    away = plans[4].stages["denoise"] - plans[6].stages["denoise"]  # 3 of 6 blocks
    assert away == pytest.approx(3 * memory.module_bytes(modules["dit"].blocks[0]) / 1e9)
    assert plans[6].stages["decode"] == plans[4].stages["decode"]  # the VAE has no blocks


def test_estimate_without_guidance_and_with_one_pass():
    modules = parts("meta")
    two = estimate(modules, dtype=torch.float32, **SHAPES)
    one = estimate(modules, dtype=torch.float32, **SHAPES, cfg_passes=1)
    assert "guide" not in two[0].stages
    velocity = 16 * 5 * 12 * 20 * 4 / 1e9
    assert two[0].stages["denoise"] - one[0].stages["denoise"] == pytest.approx(velocity)
    tiled = estimate(modules, dtype=torch.float32, **SHAPES, vae_tile=96)
    assert tiled[0].stages["decode"] < one[0].stages["decode"]


def test_pinned_memory_is_that_of_the_buffers():
    plans = estimate(parts("meta"), dtype=torch.bfloat16, **SHAPES)
    blocks = parts("cpu", torch.bfloat16)["dit"].blocks  # more than the text encoder's
    buffers = sum(HostBlock(block, CPU).buffer.nbytes for block in blocks)
    assert [plan.pinned * 1e9 for plan in plans] == pytest.approx([0, 0, 0, 0, 0, 0, buffers, buffers])


PLANS = [
    MemoryPlan("none", "none", {"guide": 9.0, "decode": 3.0}),
    MemoryPlan("parts", "block", {"guide": 2.0, "decode": 3.0}, pinned=1.5),
]


def test_the_fastest_plan_that_fits_is_chosen():
    assert choose_plan(PLANS, 10.0) is PLANS[0]
    assert choose_plan(PLANS, 9.9) is PLANS[1]
    assert PLANS[0].peak == 9.0 and PLANS[0].largest_stage == "guide"
    tiles = r"must be at least 3.3 GB here \(to decode\), got 2: try tiles \(vae_tile=256\) or fewer frames"
    with pytest.raises(UserError, match=tiles):
        choose_plan(PLANS, 2.0)
    with pytest.raises(UserError, match=r"10.0 GB here \(to guide\), got 2: try fewer frames or a smaller size"):
        choose_plan(PLANS[:1], 2.0)


def test_table():
    assert memory_table(PLANS).splitlines() == [
        "  offload recompute     guide    decode    pinned",
        "     none      none      9.00      3.00      0.00",
        "    parts     block      2.00      3.00      1.50",
    ]


def test_recompute_follows_free_memory(monkeypatch):
    dit = parts("cpu", torch.bfloat16)["dit"]
    shape = SHAPES["latent_shape"]
    assert choose_recompute(dit, shape, gradient, CPU) == "none"
    assert choose_recompute(dit, shape, gradient, CPU, offload_blocks=True) == "selective"
    plans = estimate(parts("meta"), dtype=torch.bfloat16, **SHAPES, gradient=gradient)
    weights = memory.weight_bytes(parts("meta", torch.bfloat16), "parts")["dit"]
    for plan in plans[3:6]:
        needed = plan.stages["guide"] * 1e9 - weights
        monkeypatch.setattr(memory, "free_memory", lambda device, free=needed: free / 0.9 + 1)
        assert choose_recompute(dit, shape, gradient, CUDA) == plan.recompute
        monkeypatch.setattr(memory, "free_memory", lambda device, free=needed: free / 0.9 - 1)
        assert choose_recompute(dit, shape, gradient, CUDA) != plan.recompute or plan.recompute == "block"
    blocks = 3 * memory.module_bytes(dit.blocks[0])
    needed = plans[4].stages["guide"] * 1e9 - weights + blocks
    monkeypatch.setattr(memory, "free_memory", lambda device: needed / 0.9 + 1)
    assert choose_recompute(dit, shape, gradient, CUDA, offload_blocks=True) == "selective"
    monkeypatch.setattr(memory, "free_memory", lambda device: needed / 0.9 - 1)
    assert choose_recompute(dit, shape, gradient, CUDA, offload_blocks=True) == "block"


def test_processes_agree_on_what_is_recomputed(monkeypatch):
    """What one of them must recompute, all do, also those that have room."""
    dit = parts("cpu")["dit"]
    dit.ranks = SimpleNamespace(agree=lambda index: max(index, 1))  # another process has room for "selective"
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**12)
    assert choose_recompute(dit, SHAPES["latent_shape"], gradient, CUDA) == RECOMPUTE[1]


def test_a_gradient_is_counted_once(monkeypatch):
    calls = []

    def counted(*inputs):
        calls.append(inputs)
        return gradient(*inputs)

    monkeypatch.setattr(memory, "free_memory", lambda device: 10**12)
    dit = parts("cpu")["dit"]
    for _ in range(3):
        assert choose_recompute(dit, SHAPES["latent_shape"], counted, CUDA) == "none"
    assert len(calls) == 1


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_predicted_peak_on_a_gpu(recompute):
    """A gradient at a size where attention and activations dominate, within a tenth of what the allocator saw."""
    config = DiTConfig(dim=768, ffn_dim=3072, num_heads=6, num_layers=8, text_dim=64, text_len=64)
    motion = MotionConfig(window=5)
    with CUDA:
        dit = WanDiT(config)
    memory.set_weight_dtypes({"dit": dit}, torch.bfloat16)
    one = gradient_of(motion)
    shape = (1, 16, 9, 32, 48)
    latents, text = torch.randn(shape, device=CUDA), torch.randn(1, 64, 64, device=CUDA)
    with torch.no_grad():
        one(dit, latents, text, recompute)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one(dit, latents, text, recompute)
    used = torch.cuda.max_memory_allocated() - before
    predicted = memory.gradient_bytes(config, torch.bfloat16, shape, one, recompute, False)
    assert predicted == pytest.approx(used, rel=0.1)
