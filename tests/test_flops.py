"""The cost model against torch's own counters."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wan_mini.config import T2V_1_3B, T2V_14B, DiTConfig
from wan_mini.device import flops
from wan_mini.dit import WanDiT

SMALL = DiTConfig(dim=96, ffn_dim=200, num_heads=2, num_layers=4, freq_dim=64, text_dim=24, text_len=8)
TOKENS = 2 * 8 * 12


def run(model, **options):
    latents = torch.randn(1, 16, 2, 16, 24, requires_grad=True)
    return model(latents, torch.tensor([500.0]), torch.randn(1, 8, 24), **options)


@pytest.mark.parametrize("config", [SMALL, T2V_1_3B, T2V_14B])
def test_parameters(config):
    with torch.device("meta"):
        model = WanDiT(config)
    assert flops.parameters(config) == sum(p.numel() for p in model.parameters())


def test_published_parameters():
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
        q, k = run(model, qk_block=3, recompute=recompute)
        (q * k).sum().backward()
    more = flops.block_flops(SMALL, TOKENS)[1] // 2 + 4 * TOKENS * SMALL.text_len * SMALL.dim  # of one block
    assert counter.get_total_flops() == flops.gradient_flops(SMALL, TOKENS, 3, recompute) - 3 * more


def test_selective_recomputes_linear_layers_only():
    linear, attention = flops.block_flops(SMALL, TOKENS)
    costs = {policy: flops.gradient_flops(SMALL, TOKENS, 3, policy) for policy in ("none", "selective", "block")}
    assert costs["selective"] - costs["none"] == 3 * linear
    assert costs["block"] - costs["selective"] == 3 * attention


def test_published_sizes():
    """81 frames of 480x832 on 1.3B, in TFLOP."""
    tokens = 21 * 30 * 52
    assert flops.forward_flops(T2V_1_3B, tokens) / 1e12 == pytest.approx(283.0, abs=0.05)
    assert flops.forward_flops(T2V_1_3B, tokens, 14) / 1e12 == pytest.approx(132.4, abs=0.05)
    assert flops.gradient_flops(T2V_1_3B, tokens, 14) / 1e12 == pytest.approx(405.3, abs=0.05)
