"""A GPU computes what a CPU computes, within stated tolerances; offloading and compiling change nothing.

Where there is no GPU, benchmarks/gpu_day.py --rehearse lets the CPU stand in, which shows that these tests run.
"""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastvmt import FastVMT, MotionConfig, gradient_of, transfer
from wan_mini.config import DiTConfig, UMT5Config, VAEConfig, latent_shape, token_grid
from wan_mini.device.memory import estimate
from wan_mini.device.offload import BlockPrefetcher, on_device
from wan_mini.device.select import compile_blocks, exact_float32, pick_attention
from wan_mini.device.timing import StageTimer
from wan_mini.dit import RECOMPUTE, Block, WanDiT, keeps_float32
from wan_mini.load import build_from_folder, load_wan
from wan_mini.scheduler import FlowEuler
from wan_mini.tiny.world import make_clip
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
CPU = torch.device("cpu")
COMPILE = {} if HAS_GPU else {"backend": "aot_eager"}  # inductor takes a minute
DIT = DiTConfig(dim=96, ffn_dim=192, num_heads=2, num_layers=6, freq_dim=32, text_dim=16, text_len=32)
# Norm of the difference over the norm, at most: sums in another order; bfloat16 beside float32.
FLOAT32, BFLOAT16 = 1e-3, 3e-2
MOTION = MotionConfig(steps=3, guidance_fraction=0.4, optim_steps=4, window=3, tile=(2, 3), lr=(0.02, 0.005))
CLIP = make_clip(0).frames[:9, ::2, ::2].copy()  # 9 frames of 96x64


def difference(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().cpu().float(), expected.detach().cpu().float()
    return ((got - expected).norm() / expected.norm()).item()


def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 4, 8, 12, generator=generator)
    text = torch.randn(1, 20, DIT.text_dim, generator=generator)
    return latents.to(device), torch.tensor([500.0]), text.to(device)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
def test_velocity(dtype, limit):
    dit = WanDiT(DIT).requires_grad_(False)
    with torch.no_grad():
        expected = dit(*inputs(CPU))
        dit.to(DEVICE)
        for name, weight in dit.named_parameters():
            if not keeps_float32(name):
                weight.data = weight.data.to(dtype)
        assert difference(dit(*inputs(DEVICE)), expected) <= limit


def test_vae():
    vae = WanVAE(VAEConfig(dim=8, num_res_blocks=1)).requires_grad_(False)
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    latents = vae.encode(video)
    frames = vae.decode(latents)
    vae.to(DEVICE)
    with exact_float32(DEVICE):
        assert difference(vae.encode(video.to(DEVICE)), latents) <= FLOAT32
        assert difference(vae.decode(latents.to(DEVICE)), frames) <= FLOAT32


def test_text_encoder():
    config = UMT5Config(vocab=100, dim=32, dim_attn=32, dim_ffn=64, num_heads=2, num_layers=3)
    encoder = UMT5Encoder(config).requires_grad_(False)
    ids = torch.arange(1, 25).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    expected = encoder(ids, mask)
    encoder.to(DEVICE)
    got = encoder(ids.to(DEVICE), mask.to(DEVICE))
    assert difference(got[0], expected[0]) <= FLOAT32 and difference(got[1, :7], expected[1, :7]) <= FLOAT32


def gradient(dit: WanDiT, device: torch.device, recompute: str) -> Tensor:
    """Of the loss of a guided step, with respect to the latents."""
    latents, _, text = inputs(device)
    noise = latents.flip(3)
    scheduler = FlowEuler(5, 3.0)
    with torch.no_grad():
        guidance = FastVMT(dit, latents, noise, text, text, MOTION, recompute)
        target = guidance.target_at(scheduler.sigmas[1], scheduler.timesteps[1])
    x = (0.3 * latents.flip(2) + 0.7 * noise).requires_grad_()
    loss = guidance.loss(x, timestep=scheduler.timesteps[1], target=target, norms={})
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_gradient(recompute):
    dit = WanDiT(DIT).requires_grad_(False)
    expected = gradient(dit, CPU, "none")
    assert expected.abs().max() > 0
    assert difference(gradient(dit.to(DEVICE), DEVICE, recompute), expected) <= FLOAT32


def test_compiled_blocks():
    """The same numbers, in one graph, which holds for every step and for a gradient."""
    dit = WanDiT(DIT).requires_grad_(False).to(DEVICE)
    with torch.no_grad():
        expected = dit(*inputs(DEVICE))
    plain = gradient(dit, DEVICE, "none")
    compile_blocks(dit, fullgraph=True, **COMPILE)
    latents, _, text = inputs(DEVICE)
    with torch.no_grad(), torch.compiler.set_stance("default"):
        assert difference(dit(*inputs(DEVICE)), expected) <= FLOAT32
    assert difference(gradient(dit, DEVICE, "none"), plain) <= FLOAT32
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for timestep in (1000.0, 3.0):
            assert dit(latents, torch.tensor([timestep]), text).isfinite().all()


def run(wan, device: torch.device = DEVICE, **options) -> Tensor:
    return transfer(wan, CLIP, "a ball", MOTION, seed=3, device=device, **options).latents


def test_a_whole_transfer(folder):
    expected = run(load_wan(folder, device=CPU, dtype=torch.float32), CPU)
    assert difference(run(load_wan(folder, device=DEVICE, dtype=torch.float32)), expected) <= 0.05  # an argmax may move


def test_offloading_and_repeating_change_no_bit(folder):
    """The same seed gives the same latents, wherever the weights wait."""
    there = load_wan(folder, device=DEVICE, dtype=torch.float32)
    expected = run(there, recompute="selective")
    assert torch.equal(run(there, recompute="selective"), expected)
    waiting = load_wan(folder, device=CPU, dtype=torch.float32)
    assert torch.equal(run(waiting, recompute="selective"), expected)
    assert torch.equal(run(waiting, recompute="selective", offload_blocks=True), expected)


def test_the_prefetcher_under_stress():
    """Blocks asked for in any order, while the device is late: each has its own weights when it works."""
    dit = WanDiT(replace(DIT, num_layers=8)).requires_grad_(False)
    expected = [block.ffn[0].weight.clone() for block in dit.blocks]
    with torch.device("meta"):
        placeholders = [Block(DIT) for _ in dit.blocks]
    prefetcher = BlockPrefetcher(dit.blocks, placeholders, DEVICE)
    order = random.Random(0)
    x = torch.eye(DIT.dim, device=DEVICE)
    try:
        results = []
        for step in range(300):
            index = order.choice([step % 8, 7 - step % 8, order.randrange(8)])
            if HAS_GPU and step % 10 == 0:
                torch.cuda._sleep(10**7)
            results.append((index, x @ prefetcher.fetch(index).ffn[0].weight.mT))
            assert len(prefetcher.copies) <= 3
    finally:
        prefetcher.close()
    for index, product in results:
        assert torch.equal(product.cpu().mT, expected[index])


def test_peaks_are_those_of_the_dry_run(folder):
    """Of guide, denoise and decode, on a model of which tensors are the most; a CPU has no peaks to compare."""
    _, parts = build_from_folder(folder)
    frames = make_clip(0).frames[:17].copy()
    height, width = frames.shape[1:3]
    shapes = {"video_shape": (1, 3, 17, height, width), "latent_shape": latent_shape(17, height, width)}
    plan = estimate(parts, dtype=torch.float32, **shapes, gradient=gradient_of(MOTION))[0]
    assert plan.recompute == "none" and token_grid(17, height, width)[0] == 5
    timer = StageTimer(DEVICE)
    wan = load_wan(folder, device=DEVICE, dtype=torch.float32)
    transfer(wan, frames, "a ball", MOTION, device=DEVICE, recompute="none", timer=timer)
    measured = {stage: timer.table[stage]["peak_gb"] for stage in ("encode", "guide", "denoise", "decode")}
    if HAS_GPU:
        for stage, peak in measured.items():
            assert peak == pytest.approx(plan.stages[stage], rel=0.1, abs=0.03), stage


def test_attention_kernels_are_tried_in_order():
    assert pick_attention(DEVICE, "efficient")[0] == "efficient"
    assert bool(pick_attention(DEVICE)) == HAS_GPU


def test_the_module_comes_back_from_the_device():
    dit = WanDiT(DIT).requires_grad_(False)
    with on_device(dit, DEVICE):
        assert dit.patch_embedding.weight.device.type == DEVICE.type
    assert dit.patch_embedding.weight.device.type == "cpu"
