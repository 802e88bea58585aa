"""A transformer's weights over several processes, by torch's FSDP2: each holds a part of every weight.

A block's whole weights are gathered when it works, forward or backward, and dropped behind it, so a process holds its
part of all and the whole of two or three blocks. The arithmetic is that of whole weights. Every process must call the
same blocks in the same order, or all wait forever; parallel.Ranks sees to that.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from wan_mini.device.offload import block_owners
from wan_mini.errors import UserError


def shard_weights(dit: nn.Module, device: torch.device, processes: int) -> None:
    """Let each process keep its part of a WanDiT's weights, or of both experts' of Wan 2.2, on its device; in place.

    Weights may be in the host's memory before: then no more than a block of them is on the device as a whole.
    Raises UserError if they are not read yet.
    """
    if any(weight.is_meta for weight in dit.parameters()):
        raise UserError("--parallel with weights needs weights that are read before the run, got --offload on a CPU")
    mesh = init_device_mesh(device.type, (processes,))
    for model in block_owners(dit):
        for block in model.blocks.children():  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, "qk")
        fully_shard(model, mesh=mesh)


def local_tensors(module: nn.Module) -> Iterator[Tensor]:
    """What this process holds of each weight."""
    for weight in module.parameters():
        yield weight.to_local() if isinstance(weight, DTensor) else weight


def held_bytes(module: nn.Module) -> int:
    """Bytes of weights that this process holds."""
    return sum(tensor.nbytes for tensor in local_tensors(module))
