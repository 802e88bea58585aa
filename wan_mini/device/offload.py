"""Weights in the host's memory, and on the device only while they work. Exact: they are only copied."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._mode_utils import no_dispatch  # torch has no public way to hide operations from a checkpoint

from wan_mini.errors import UserError

# What is on the device: all parts; the part at work; of the part at work, three blocks and what is not in a block.
OFFLOAD = ("none", "parts", "blocks")
ALIGNMENT = 64  # bytes; a weight that starts at a multiple of it can be read in the widest steps of any kernel


@contextmanager
def on_device(module: nn.Module, device: torch.device, *, offload_blocks: bool = False) -> Iterator[None]:
    """Keep a module on the device inside the `with`; afterwards, the module is where it was.

    Weights are copied to the device and never back: they must not be changed inside. With offload_blocks, the module's
    `blocks` stay in the host's memory, and each is copied when its turn comes, while the one before it works. A
    backward then keeps every copy that it will need, so blocks should be recomputed there (dit.RECOMPUTE).
    Raises UserError if the blocks to offload are not in the host's memory, or if that cannot be pinned.
    """
    with ExitStack() as stack:
        if offload_blocks:
            for owner in block_owners(module):
                stack.enter_context(_blocks_on_host(owner, device))
        stack.enter_context(_weights_on_device(module, device))
        yield


def block_owners(module: nn.Module) -> list[nn.Module]:
    """The modules with blocks of their own: a transformer itself, or both experts of Wan 2.2."""
    return [part for part in module.modules() if isinstance(getattr(part, "blocks", None), nn.ModuleList)]


@contextmanager
def _weights_on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Exchange a module's weights for copies on the device, or read them for as long as they work (load_wan).

    Weights that several processes share out (shard.py) are there already.
    """
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        yield
        return
    read = getattr(module, "read_weights", None)
    if read is not None:
        read()
        try:
            yield
        finally:
            module.to("meta")
        return
    originals = dict(module.named_parameters())
    copies = {name: weight.detach().to(device) for name, weight in originals.items()}
    module.load_state_dict(copies, assign=True)
    del copies
    try:
        yield
    finally:
        module.load_state_dict(originals, assign=True)


@contextmanager
def _blocks_on_host(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Exchange a module's `blocks` for proxies, which call copies of them on the device."""
    blocks: Any = module.blocks
    with torch.device("meta"):
        placeholders = [type(block)(module.config) for block in blocks]
    prefetcher = BlockPrefetcher(blocks, placeholders, device)
    try:
        module.blocks = nn.ModuleList(BlockProxy(prefetcher, index) for index in range(len(blocks)))
        yield
    finally:
        module.blocks = blocks
        prefetcher.close()


@dataclass(frozen=True)
class Segment:
    """Where one weight lies in its block's flat buffer."""

    start: int  # bytes
    stop: int
    dtype: torch.dtype
    shape: torch.Size

    def view(self, buffer: Tensor) -> Tensor:
        """The weight in a flat buffer of bytes, without a copy."""
        return buffer[self.start : self.stop].view(self.dtype).view(self.shape)  # (bytes,) -> (numel,) -> shape


def lay_out(block: nn.Module) -> dict[str, Segment]:
    """The position of every weight of a block in one flat buffer, in order."""
    segments: dict[str, Segment] = {}
    end = 0
    for name, weight in block.named_parameters():
        start = -(-end // ALIGNMENT) * ALIGNMENT  # the end of the weight before, rounded up
        end = start + weight.nbytes
        segments[name] = Segment(start, end, weight.dtype, weight.shape)
    return segments


class HostBlock:
    """One block's weights in a flat, page-locked buffer of the host, from where a GPU fetches them in one copy.

    The block's weights become views into that buffer, so the host holds them once. It is exactly as large as they are:
    torch's own pinned memory is rounded up to powers of two, and never given back. A block that was packed before keeps
    its buffer. Only a CUDA device needs page-locked memory, to copy and compute at the same time.
    """

    def __init__(self, block: nn.Module, device: torch.device):
        self.segments = lay_out(block)
        self.buffer = self._pack(block)
        self.pinned = False
        if device.type == "cuda":
            self._pin()

    def _pack(self, block: nn.Module) -> Tensor:
        size = max(segment.stop for segment in self.segments.values())
        weights = dict(block.named_parameters())
        storage = next(iter(weights.values())).untyped_storage()
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
        if flat.nbytes == size and all(self._holds(flat, name, weight) for name, weight in weights.items()):
            return flat
        flat = torch.empty(size, dtype=torch.uint8)
        for name, weight in weights.items():
            weight.data = self.segments[name].view(flat).copy_(weight.detach())  # what it held before is freed here
        return flat

    def _holds(self, flat: Tensor, name: str, weight: Tensor) -> bool:
        return weight.data_ptr() == flat.data_ptr() + self.segments[name].start

    def _pin(self) -> None:
        code = int(torch.cuda.cudart().cudaHostRegister(self.buffer.data_ptr(), self.buffer.nbytes, 0))
        if code != 0:
            size = f"{self.buffer.nbytes / 1e9:.2f} GB"
            raise UserError(f"cannot pin a block of {size} in the host's memory (CUDA error {code}): offload parts")
        self.pinned = True

    def release(self) -> None:
        """Make the buffer pageable again; the weights stay in it."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr())
            self.pinned = False


@dataclass(frozen=True)
class DeviceBlock:
    """A flat copy of a block on the device, and the event that tells when a GPU has finished it."""

    buffer: Tensor
    done: torch.cuda.Event | None


class BlockPrefetcher:
    """Copies blocks to the device, the next one in advance: forwards, or backwards if the calls are.

    At most three copies are kept: of the block at work, of the one before it, and of the one to come. On a GPU they are
    made on a second stream, beside the work of the block before. Their memory belongs to the first stream, which may
    still read what was there before; so the second one waits for all work that was queued when a copy begins.
    """

    def __init__(self, blocks: nn.ModuleList, placeholders: list[nn.Module], device: torch.device):
        """Placeholders are modules like the blocks, on the meta device: they hold the copies while they work."""
        for weight in blocks.parameters():
            if weight.device.type != "cpu":
                raise UserError(f"blocks to offload must be loaded on the CPU first, got some on {weight.device}")
        self.device = device
        self.placeholders = placeholders
        for placeholder in placeholders:
            placeholder.requires_grad_(False)
        self.copies: dict[int, DeviceBlock] = {}
        self.last = 0
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
        self.host: list[HostBlock] = []
        try:
            for block in blocks:
                self.host.append(HostBlock(block, device))
        except BaseException:
            self.close()
            raise

    def prefetch(self, index: int) -> None:
        """Begin to copy a block, unless it is there, or there is no such block."""
        if index in self.copies or not 0 <= index < len(self.host):
            return
        source = self.host[index].buffer
        buffer = torch.empty_like(source, device=self.device)
        if self.stream is None:
            self.copies[index] = DeviceBlock(buffer.copy_(source), None)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            buffer.copy_(source, non_blocking=True)
            done = self.stream.record_event()
        self.copies[index] = DeviceBlock(buffer, done)

    def fetch(self, index: int) -> nn.Module:
        """The block, ready on the device; its neighbor in the direction of the calls is on its way."""
        backwards = 0 < index < self.last
        ahead = index - 1 if backwards else index + 1
        # A selective checkpoint compares the operations of a block with those of its recomputation: these are no part
        # of it, and they differ, since a copy may be there or not.
        with no_dispatch():
            for old in self.copies.keys() - {index, self.last, ahead}:
                self.drop(old)
            self.prefetch(index)
            self._fill_placeholder(index)
            self.prefetch(ahead)
        self.last = index
        return self.placeholders[index]

    def _fill_placeholder(self, index: int) -> None:
        """Give a placeholder its weights, as views into the copy, once that is finished."""
        copy = self.copies[index]
        self._wait_for(copy)
        weights = {}
        for name, segment in self.host[index].segments.items():
            weights[name] = segment.view(copy.buffer)
        self.placeholders[index].load_state_dict(weights, assign=True)

    def _wait_for(self, copy: DeviceBlock) -> None:
        """Let what is queued from now on begin after a copy has been made."""
        if copy.done is not None:
            torch.cuda.current_stream(self.device).wait_event(copy.done)

    def drop(self, index: int) -> None:
        """Forget a copy; its memory is free when no backward needs it any more."""
        self._wait_for(self.copies.pop(index))  # or a copy that nobody has fetched might still be written there
        self.placeholders[index].to("meta")

    def close(self) -> None:
        """Forget all copies, and release the host's memory once none is being made."""
        for index in list(self.copies):
            self.drop(index)
        if self.stream is not None:
            self.stream.synchronize()
        for block in self.host:
            block.release()


class BlockProxy(nn.Module):
    """Stands for a block whose weights are in the host's memory, and calls its copy on the device."""

    def __init__(self, prefetcher: BlockPrefetcher, index: int):
        super().__init__()
        self.prefetcher = prefetcher
        self.index = index

    @property
    def self_attn(self) -> Any:
        """The self-attention of the block's copy, for hooks: they stay when its weights come and go."""
        return self.prefetcher.placeholders[self.index].self_attn

    def forward(self, *inputs: Any) -> Tensor:
        """Inputs and result are the block's."""
        return self.prefetcher.fetch(self.index)(*inputs)

    def qk(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """dit.Block.qk: the queries and keys of its self-attention."""
        block: Any = self.prefetcher.fetch(self.index)
        return block.qk(*inputs)
