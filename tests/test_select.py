"""Device, dtype and attention: what is chosen on machines of every kind, and what it does on this one."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from wan_mini.device import select
from wan_mini.device.select import (
    attention_backend,
    describe,
    exact_float32,
    has_fast_bfloat16,
    pick_attention,
    pick_device,
    pick_dtype,
)
from wan_mini.errors import UserError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pretend(monkeypatch, *, gpus: int = 0, mps: bool = False, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def pretend_cpu(monkeypatch, **capabilities) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize(
    ("machine", "best"),
    [({}, "cpu"), ({"mps": True}, "mps"), ({"gpus": 1}, "cuda"), ({"gpus": 2, "mps": True}, "cuda")],
)
def test_the_fastest_device_is_picked(machine, best, monkeypatch):
    pretend(monkeypatch, **machine)
    assert pick_device() == torch.device(best)
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize(
    ("machine", "name", "usable"),
    [
        ({}, "cuda", "cpu"),
        ({}, "mps", "cpu"),
        ({"gpus": 1}, "cuda:7", "cuda, cpu"),
        ({"gpus": 1}, "cuda:1", "cuda, cpu"),
        ({"gpus": 3}, "cuda:3", "cuda, cuda:1, cuda:2, cpu"),
        ({"mps": True}, "cuda", "mps, cpu"),
        ({}, "meta", "cpu"),
        ({}, "gpu", "cpu"),
        ({}, "cuda:x", "cpu"),
        ({}, "", "cpu"),
        ({}, "cpu:x", "cpu"),
        ({}, "cpu:9:9", "cpu"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(machine, name, usable, monkeypatch):
    pretend(monkeypatch, **machine)
    with pytest.raises(UserError) as error:
        pick_device(name)
    assert str(error.value) == f"device {name} is not available here, choose one of: {usable}"


def test_a_device_by_number(monkeypatch):
    pretend(monkeypatch, gpus=2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "cpu_name": "AMD Ryzen"}, False),
        ({}, False),
    ],
)
def test_bfloat16_on_a_cpu_that_is_faster_with_it(capabilities, fast, monkeypatch):
    pretend_cpu(monkeypatch, **capabilities)
    assert has_fast_bfloat16(CPU) == fast
    assert pick_dtype(CPU) == (torch.bfloat16 if fast else torch.float32)
    assert pick_dtype(CPU, "float32") == torch.float32
    assert pick_dtype(CPU, "bfloat16") == torch.bfloat16
    assert not has_fast_bfloat16(MPS)


def test_a_torch_that_does_not_know_its_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_dtype(CPU) == torch.float32


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_bfloat16_on_a_gpu(capability, dtype, monkeypatch):
    pretend(monkeypatch, gpus=1, capability=capability)
    assert pick_dtype(CUDA) == dtype


def test_an_unknown_dtype_is_one_line():
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, got float16"):
        pick_dtype(CPU, "float16")


def test_attention_by_device(monkeypatch):
    pretend(monkeypatch, gpus=1, capability=(9, 0))
    assert pick_attention(CUDA) == ("cudnn", "flash", "efficient", "math")
    assert pick_attention(CUDA, "flash") == ("flash", "cudnn", "efficient", "math")
    pretend(monkeypatch, gpus=1, capability=(8, 9))
    assert pick_attention(CUDA) == ("flash", "efficient", "math")
    assert pick_attention(CUDA, "cudnn") == ("cudnn", "flash", "efficient", "math")
    monkeypatch.setitem(select.MEASURED_ATTENTION, (8, 9), ("efficient", "flash", "math"))
    assert pick_attention(CUDA) == ("efficient", "flash", "math")
    assert pick_attention(CUDA, "math") == ("math", "efficient", "flash")
    assert pick_attention(CPU) == pick_attention(MPS) == ()
    assert pick_attention(CPU, "math")[0] == "math"
    with pytest.raises(UserError, match="attention must be one of cudnn, flash, efficient, math, got torch"):
        pick_attention(CPU, "torch")


def attention_kernels(order: tuple[str, ...]) -> list[str]:
    """Names of the attention operations that run under this order."""
    q = torch.randn(1, 2, 16, 8)
    with attention_backend(order), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as log:
        F.scaled_dot_product_attention(q, q, q)
    return [event.key for event in log.key_averages() if "attention" in event.key or "bmm" in event.key]


def test_the_attention_backend_is_the_one_that_runs():
    own = attention_kernels(())
    assert any("flash" in kernel for kernel in own)
    assert not any("flash" in kernel for kernel in attention_kernels(("math",)))
    assert attention_kernels(("flash", "math")) == own
    assert attention_kernels(()) == own  # restored


def test_the_attention_order_is_torchs(monkeypatch):
    calls = []

    def record(backends, set_priority):
        calls.append((backends, set_priority))
        return torch.enable_grad()

    monkeypatch.setattr(select, "sdpa_kernel", record)
    with attention_backend(("cudnn", "efficient")):
        assert calls == [([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], True)]
    with attention_backend(()):
        assert len(calls) == 1


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        (CUDA, [torch.backends.cudnn.conv, torch.backends.cuda.matmul]),
        (CPU, [torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul]),
        (MPS, []),
    ],
)
def test_float32_is_exact_inside_only(device, settings):
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32"
        with pytest.raises(KeyError), exact_float32(device):
            assert [setting.fp32_precision for setting in settings] == ["ieee"] * len(settings)
            raise KeyError
        assert [setting.fp32_precision for setting in settings] == ["tf32"] * len(settings)
    finally:
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision


def test_description(monkeypatch):
    pretend(monkeypatch, gpus=1)
    line = describe(torch.device("cuda:0"), torch.bfloat16, ("cudnn", "flash"))
    assert line == "NVIDIA H100 (cuda:0), bfloat16, attention: cudnn > flash"
    pretend_cpu(monkeypatch, amx_bf16=True)
    threads = torch.get_num_threads()
    expected = f"cpu (amx_bf16, threads: {threads}), bfloat16, attention: torch's choice"
    assert describe(CPU, torch.bfloat16, ()) == expected
    pretend_cpu(monkeypatch)
    assert describe(CPU, torch.float32, ()).startswith(f"cpu (no fast bfloat16, threads: {threads}), float32")
    assert describe(MPS, torch.float32, ()) == "mps, float32, attention: torch's choice"


@pytest.mark.gpu
@gpu
def test_convolutions_are_exact_on_a_gpu():
    x, weight = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 3, 3)
    expected = F.conv2d(x.double(), weight.double())
    with exact_float32(CUDA):
        exact = F.conv2d(x.cuda(), weight.cuda()).cpu()
    rounded = F.conv2d(x.cuda(), weight.cuda()).cpu()
    assert (exact - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (rounded - expected).abs().max() > 3 * (exact - expected).abs().max()  # TF32 is on outside


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", ["flash", "efficient", "math"])
def test_every_attention_backend_agrees_on_a_gpu(name):
    q = torch.randn(1, 4, 256, 64, device=CUDA, dtype=torch.bfloat16)
    with attention_backend(("math",)):
        expected = F.scaled_dot_product_attention(q, q, q)
    with attention_backend((name,)):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), expected, atol=2e-2, rtol=2e-2)
    order = pick_attention(CUDA)
    wide = torch.randn(1, 1, 64, 384, device=CUDA)  # the VAE's: float32 and a head that no flash kernel takes
    with attention_backend(order):
        assert F.scaled_dot_product_attention(wide, wide, wide).isfinite().all()
