"""The cost model against torch's own counters."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from wan_mini.config import T2V_1_3B, T2V_14B, DiTConfig
from wan_mini.device import flops
from wan_mini.dit import RECOMPUTE, WanDiT, keeps_float32

SMALL = DiTConfig(dim=96, ffn_dim=200, num_heads=2, num_layers=4, freq_dim=64, text_dim=24, text_len=8)
TOKENS = 2 * 8 * 12


def run(model, **options):
    latents = torch.randn(1, 16, 2, 16, 24, requires_grad=True)
    return latents, model(latents, torch.tensor([500.0]), torch.randn(1, 8, 24), **options)


def test_parameters():
    assert flops.parameters(SMALL) == sum(p.numel() for p in WanDiT(SMALL).parameters())
    assert flops.parameters(T2V_1_3B) == 1_418_996_800
    assert flops.parameters(T2V_14B) == 14_288_491_584


@pytest.mark.parametrize("block", [None, 0, 3])
def test_forward(block):
    model = WanDiT(SMALL).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(model, qk_block=block)
    assert counter.get_total_flops() == flops.forward_flops(SMALL, TOKENS, block)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_gradient(recompute):
    """The math backend keeps logits and skips gradients of the text's keys and values; flash attention does neither."""
    model = WanDiT(SMALL).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, (q, k) = run(model, qk_block=3, recompute=recompute)
        (q * k).sum().backward()
    more = flops.block_flops(SMALL, TOKENS)[1] // 2 + 4 * TOKENS * SMALL.text_len * SMALL.dim  # of one block
    assert counter.get_total_flops() == flops.gradient_flops(SMALL, TOKENS, 3, recompute) - 3 * more


def test_published_sizes():
    """81 frames of 480x832 on 1.3B, in TFLOP."""
    tokens = 21 * 30 * 52
    assert flops.forward_flops(T2V_1_3B, tokens) / 1e12 == pytest.approx(283.0, abs=0.05)
    assert flops.forward_flops(T2V_1_3B, tokens, 14) / 1e12 == pytest.approx(132.4, abs=0.05)
    assert flops.gradient_flops(T2V_1_3B, tokens, 14) / 1e12 == pytest.approx(405.3, abs=0.05)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_activation_bytes(width, recompute):
    """Against what is really alive after the forward, of two blocks more (the block being recomputed is not, then)."""
    model = WanDiT(SMALL).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if width == 2 and not keeps_float32(name):
            parameter.data = parameter.data.bfloat16()

    def kept(block):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
            held = run(model, qk_block=block, recompute=recompute)
        events = [event.nbytes() for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
        return held and sum(events)

    modeled = [flops.activation_bytes(SMALL, TOKENS, block, width, recompute) for block in (1, 3)]
    assert kept(3) - kept(1) == pytest.approx(modeled[1] - modeled[0], rel=0.02)
