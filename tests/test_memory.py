"""Memory that is foreseen, beside memory that is used."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.speed.measure import logged_peak
from fastvmt import MotionConfig, one_gradient
from wan_mini.config import DiTConfig, UMT5Config, VAEConfig
from wan_mini.device import memory
from wan_mini.device.memory import Plan, as_loaded, choose, peak_bytes, plans, stage_calls
from wan_mini.dit import RECOMPUTE, WanDiT
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import CausalConv3d, WanVAE

CONFIG = MotionConfig(height=96, width=160, frames=17, window=3)
SIZES = {
    "dit": (WanDiT, DiTConfig(dim=96, ffn_dim=192, num_heads=2, num_layers=6, freq_dim=32, text_dim=16, text_len=8)),
    "vae": (WanVAE, VAEConfig(dim=8, num_res_blocks=1)),
    "text_encoder": (UMT5Encoder, UMT5Config(vocab=50, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=3)),
}
gradient = partial(one_gradient, config=CONFIG)


def parts(device: str, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    with torch.device(device):
        found = {name: build(config) for name, (build, config) in SIZES.items()}
    as_loaded(found, dtype)
    return found


def test_living_bytes_by_hand():
    x = torch.empty(100, device="meta")  # 400 bytes that were there before

    def call():
        a = x + 1  # 400
        b = a.reshape(10, 10).mT  # a view
        c = torch.cat([b, b])  # 1,200
        del a, b  # 800
        return c.sum()  # 804

    assert peak_bytes(call) == 1200


@pytest.mark.parametrize("stage", ["encode", "decode", "denoise", *(f"guide {policy}" for policy in RECOMPUTE)])
def test_what_is_foreseen_is_what_is_used(stage, monkeypatch):
    """On a CPU, but for what its convolutions take for themselves: they are replaced by their result's shape."""

    def empty_result(conv, x, weight, *_):
        convolution = F.conv3d if x.ndim == 5 else F.conv2d
        return x.new_zeros(convolution(x.to("meta"), weight.to("meta"), None, conv.stride, conv.padding).shape)

    monkeypatch.setattr(CausalConv3d, "convolve", empty_result)
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", empty_result)
    calls = stage_calls(parts("cpu"), CONFIG, gradient)[stage], stage_calls(parts("meta"), CONFIG, gradient)[stage]
    with torch.no_grad():
        used = logged_peak(calls[0])
    with torch.no_grad():
        foreseen = peak_bytes(calls[1])
    assert foreseen == pytest.approx(used, rel=0.1)


def test_the_leanest_that_is_fast_enough_is_chosen():
    found = plans(parts("meta", torch.bfloat16), CONFIG, gradient)
    assert [(way.offload, way.recompute) for way in found] == memory.WAYS
    assert all(set(way.stages) == {"text", "encode", "guide", "denoise", "decode"} for way in found)
    for lean, rich in zip(found[1:3], found):
        assert lean.stages["guide"] < rich.stages["guide"]
    some = [Plan("none", "none", {"guide": 9.0, "decode": 3.0}), Plan("parts", "block", {"guide": 2.0, "decode": 3.0})]
    assert choose(some, 10.0) is some[0] and choose(some, 9.9) is some[1]
    with pytest.raises(ValueError, match="at least 3.3 here .to decode., got 2: try --set vae_tile"):
        choose(some, 2.0)
