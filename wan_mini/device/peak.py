"""The most memory that a call takes, counted while it runs on meta tensors.

A tensor on the meta device has a shape and a dtype, but no contents. So a call at full size takes seconds, and the very
code that will run is counted. Only attention is exchanged for the kernel that a GPU has for it. (A GPU fuses rms_norm
too, but its formula holds no more at once at any stage's peak, to the byte, as long as its weights are frozen.)
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public way to see every operation


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The memory of a fused attention kernel, which never holds N x N logits: (B,M,N,D), 2 x (B,M,L,D) -> (B,M,N,D)."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextmanager
def gpu_attention() -> Iterator[None]:
    """Inside it, attention on meta tensors takes the memory of a GPU's kernel, not that of its formula."""
    kernels = library.Library("aten", "IMPL")  # what it registers holds as long as it lives
    kernels.impl("scaled_dot_product_attention", fused_attention, "AutogradMeta")
    try:
        yield
    finally:
        del kernels


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for element in value:
            yield from tensors_in(element)


class LiveBytesCounter(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside it make, for as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, weakref.ref] = {}  # by id, which a storage keeps for life
        self.bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        inputs = {id(x.untyped_storage()) for x in tensors_in((args, kwargs))}
        for x in tensors_in(result):
            storage = x.untyped_storage()
            is_view = id(storage) in inputs or id(storage) in self.live
            if not is_view:
                self.add(storage)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key = id(storage)
        size = storage.nbytes()

        def free(_: weakref.ref) -> None:
            del self.live[key]
            self.bytes -= size

        self.live[key] = weakref.ref(storage, free)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that the tensors made by a call on meta tensors hold at once, its result included."""
    with gpu_attention(), LiveBytesCounter() as counter:
        call()
    return counter.peak
