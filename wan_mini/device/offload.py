"""Weights in the host's memory, and on the device only while they work. Exact: they are only copied."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

from wan_mini.device.select import side_stream

# What is on the device: all parts; the part at work; of the part at work, three blocks and what is not in a block.
OFFLOAD = ("none", "parts", "blocks")


@contextmanager
def resident(module: nn.Module, device: torch.device, *, blocks: bool = True) -> Iterator[None]:
    """Keep a module on the device inside the `with`, and where it came from outside of it.

    With blocks=False its `blocks` stay behind: each is copied to the device when its turn comes, while the one before
    it works. Their weights are frozen then. A backward keeps every copy that it will need, so blocks should be
    recomputed there (dit.RECOMPUTE). Raises ValueError if the blocks are not in the host's memory.
    """
    home, behind = next(module.parameters()).device, None if blocks else module.blocks
    try:
        if behind is not None:
            stream = BlockStream(behind, device)
            module.blocks = nn.ModuleList()  # so that .to leaves them where they are
        module.to(device)
        if behind is not None:
            module.blocks = nn.ModuleList(Visitor(stream, index) for index in range(len(behind)))
        yield
    finally:
        if behind is not None:
            module.blocks = behind
        module.to(home)


class BlockStream:
    """Copies blocks to the device, the next one ahead of its time: forwards, or backwards if the calls turn round.

    On a GPU, copies run on a stream of their own, beside the work of the block before. They wait for what was queued
    when they begin, since the memory they get may have belonged to something that is still being read.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device):
        if any(weight.device.type != "cpu" for weight in blocks.parameters()):
            raise ValueError("blocks must be in the host's memory, got some on a device: load them on the CPU first")
        self.device, self.last, self.side = device, 0, side_stream(device)
        ghosts = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in blocks.parameters()}
        self.shells = deepcopy(blocks, ghosts)  # modules without weights, to hold the copies
        if self.side is not None:
            for weight in blocks.parameters():
                weight.data = weight.data.pin_memory()  # or a copy would not run beside anything
        self.host = [block.state_dict() for block in blocks]
        self.there: dict[int, tuple[dict[str, Tensor], torch.cuda.Event | None]] = {}

    def copy(self, index: int) -> None:
        """Begin to copy a block's weights."""
        if index in self.there or not 0 <= index < len(self.host):
            return
        if self.side is None:
            self.there[index] = {name: x.to(self.device) for name, x in self.host[index].items()}, None
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            weights = {name: x.to(self.device, non_blocking=True) for name, x in self.host[index].items()}
            self.there[index] = weights, self.side.record_event()

    def fetch(self, index: int) -> nn.Module:
        """The block, ready on the device; its neighbor in the direction of the calls is on its way."""
        ahead = index + 1 if index >= self.last or index == 0 else index - 1
        with no_dispatch():  # a selective checkpoint counts the operations of a block, and these are none
            for old in self.there.keys() - {index, self.last, ahead}:
                del self.there[old]
                self.shells[old].to("meta")
            self.copy(index)
            weights, done = self.there[index]
            if done is not None:
                torch.cuda.current_stream(self.device).wait_event(done)
            self.shells[index].load_state_dict(weights, assign=True)
            self.copy(ahead)
        self.last = index
        return self.shells[index]


class Visitor(nn.Module):
    """Stands for a block that is elsewhere."""

    def __init__(self, stream: BlockStream, index: int):
        super().__init__()
        self.stream, self.index = stream, index

    def forward(self, *inputs: Any) -> Tensor:
        return self.stream.fetch(self.index)(*inputs)

    def qk(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """dit.Block.qk."""
        return self.stream.fetch(self.index).qk(*inputs)
