"""What a run computes with: its device, its dtype, its attention kernel, its compiler."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_mini.device.offload import block_owners
from wan_mini.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTION_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# The order measured on GPUs of a compute capability, by `python -m benchmarks.speed.dit`; others follow the rule below.
MEASURED_ATTENTION: dict[tuple[int, int], tuple[str, ...]] = {}


def device_counts() -> dict[str, int]:
    """Number of usable devices of each kind, the fastest kind first."""
    counts = {}
    if torch.cuda.is_available():
        counts["cuda"] = torch.cuda.device_count()
    if torch.backends.mps.is_available():
        counts["mps"] = 1
    counts["cpu"] = 1
    return counts


def pick_device(name: str | None = None) -> torch.device:
    """The named device ("cuda", "cuda:1", "mps", "cpu"), else the fastest kind there is.

    Raises UserError if there is no such device.
    """
    counts = device_counts()
    if name is None:
        return torch.device(next(iter(counts)))
    try:
        device = torch.device(name)
    except RuntimeError:  # no device has such a name
        device = None
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        usable = []
        for kind, count in counts.items():
            usable.append(kind)
            usable += [f"{kind}:{index}" for index in range(1, count)]
        raise UserError(f"device {name} is not available here, choose one of: {', '.join(usable)}")
    return device


def device_of_process(name: str | None) -> torch.device:
    """The named or best device; of several GPUs the one of this process, where torchrun has started it."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    return device


def bfloat16_unit(device: torch.device) -> str | None:
    """The instructions by which a CPU multiplies bfloat16 faster than float32; None if it has none.

    Matrix instructions (AMX), or vector instructions (AVX512-BF16) unless they are Intel's, which run at half rate: on
    a Xeon with AMX switched off, the tiny model took 1.04 to 1.28 times its float32 time.
    """
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return None
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16", False):
        return "amx_bf16"
    is_intel = "Intel" in str(capabilities.get("cpu_name", ""))
    if capabilities.get("avx512_bf16", False) and not is_intel:
        return "avx512_bf16"
    return None


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself, and faster than float32.

    An older GPU claims to support bfloat16 but emulates it, so its compute capability decides.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bfloat16_unit(device) is not None


def pick_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """The named dtype, else bfloat16 where has_fast_bfloat16, else float32. Raises UserError for another name.

    On a Xeon with AMX, the tiny model's denoising step took 0.6 of its float32 time, a guidance gradient 0.83.
    """
    if name is None:
        name = "bfloat16" if has_fast_bfloat16(device) else "float32"
    if name not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def pick_attention(device: torch.device, name: str | None = None) -> tuple[str, ...]:
    """The attention kernels to try, the first choice first; () leaves the choice to torch, as on CPU and MPS.

    With a name, that kernel comes first, and the others are used where it cannot be: no flash kernel takes float32
    or the VAE's wide head, and cuDNN's takes neither. Hopper GPUs and later have the faster cuDNN kernels; what was
    measured on an architecture (MEASURED_ATTENTION) holds there instead.
    Raises UserError for a name outside ATTENTION_BACKENDS.
    """
    if name is not None and name not in ATTENTION_BACKENDS:
        raise UserError(f"attention must be one of {', '.join(ATTENTION_BACKENDS)}, got {name}")
    if name is None and device.type != "cuda":
        return ()
    order = ["flash", "efficient", "math"]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (9, 0):
            order.insert(0, "cudnn")
        order = list(MEASURED_ATTENTION.get(capability, order))
    if name is not None:
        order = [name, *(other for other in order if other != name)]
    return tuple(order)


@contextmanager
def attention_backend(order: tuple[str, ...]) -> Iterator[None]:
    """Let scaled_dot_product_attention use these kernels of ATTENTION_BACKENDS only.

    It takes the first that can do what is asked. () leaves the choice as it is.
    """
    if not order:
        yield
        return
    with sdpa_kernel([ATTENTION_BACKENDS[name] for name in order], set_priority=True):
        yield


def exact_float32(device: torch.device) -> AbstractContextManager[None]:
    """Compute float32 convolutions and matrix products in float32 inside the `with`, not in TF32 or bfloat16."""
    return float32_products(device, "ieee")


@contextmanager
def float32_products(device: torch.device, precision: str) -> Iterator[None]:
    """Compute float32 convolutions and matrix products by "ieee" (exact) or "tf32" inside the `with`.

    TF32 keeps 10 of 23 bits of a product's factors, and is torch's default for convolutions on a GPU. It is for GPUs
    only: a CPU stays exact.
    """
    backends: Any = torch.backends  # whose type hints do not know these settings
    settings: tuple[Any, ...] = ()
    if device.type == "cuda":
        settings = (backends.cudnn.conv, backends.cuda.matmul)
    elif device.type == "cpu":
        settings = (backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee" if device.type == "cpu" else precision
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def describe(device: torch.device, dtype: torch.dtype, attention: tuple[str, ...]) -> str:
    """One line on what a run computes with, for its log and its record."""
    name = str(device)
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({device})"
    elif device.type == "cpu":
        unit = bfloat16_unit(device) or "no fast bfloat16"
        name = f"cpu ({unit}, threads: {torch.get_num_threads()})"
    kernels = " > ".join(attention) or "torch's choice"
    return f"{name}, {str(dtype).removeprefix('torch.')}, attention: {kernels}"


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Let torch.compile make a transformer's `blocks` faster, in place; options are torch.compile's.

    All blocks share one compiled code, and one more for gradients. It is compiled when a block first runs, in a minute
    or so, and kept on disk for the next process.
    """
    blocks: Any = model.blocks
    for block in blocks:
        block.compile(dynamic=False, **options)


def compile_regions(dit: nn.Module, text_encoder: nn.Module, **options: Any) -> None:
    """Compile a transformer's blocks, queries and keys, and head, and a text encoder's blocks, in place.

    Each is one graph (fullgraph) and serves all steps of a run. options: torch.compile's. The VAE is left out: what
    stands between its convolutions has more sizes and layouts than the eight codes that torch compiles of a function.
    """
    options = {"fullgraph": True, **options}
    compile_blocks(dit, **options)
    for model in block_owners(dit):
        transformer: Any = model
        transformer.head.compile(dynamic=False, **options)
        for block in transformer.blocks:
            block.qk = torch.compile(block.qk, dynamic=False, **options)
    encoder: Any = text_encoder
    for block in encoder.blocks:
        block.compile(**options)  # texts differ in length
