"""Low-rank adapters on chosen heads of the self-attention, added by hooks: the model's own weights never change.

    adapters = lora_on(dit, heads, rank=16, seed=0)
    with attached(dit, adapters):
        velocity = dit(latents, timestep, text)

An adapter adds B A x to what a linear layer makes of x (LoRA, arXiv 2106.09685). For q, k and v only the output rows
of the chosen heads are touched, for o only their input columns. An untouched head keeps its raw q and k to the bit,
but not its normalized ones: Wan's norm divides by the root mean square over all heads together.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wan_mini.dit import WanDiT
from wan_mini.errors import MissingFile, UserError
from wan_mini.json_file import parse_json

TARGETS = "qkvo"  # the linear layers of a self-attention


class Attachable(Protocol):
    """Trainable weights beside a model, which they change through hooks."""

    def hook(self, dit: WanDiT) -> Iterator[Any]:
        """Register hooks on the model, and yield their handles."""
        ...


class LoRA(nn.Module):
    """strength * (alpha / rank) * B A x, on chosen rows of the output and columns of the input.

    A (rank, in) starts uniform (Kaiming, a = sqrt 5), B (out, rank) at zero, both float32; rows (out,) and
    columns (in,) are 0 or 1.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor, columns: Tensor, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, len(columns)))
        self.B = nn.Parameter(torch.zeros(len(rows), rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5, generator=generator)
        self.register_buffer("rows", rows.float(), persistent=False)
        self.register_buffer("columns", columns.float(), persistent=False)
        self.gain = alpha / rank
        self.strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype: the weights are cast to it, as a float32 x would be kept whole."""
        down = (self.A * self.columns).to(x.dtype)
        up = (self.rows[:, None] * self.B).to(x.dtype)
        return self.strength * self.gain * F.linear(F.linear(x, down), up)  # (..., in) -> (..., rank) -> (..., out)

    def delta(self) -> Tensor:
        """What the adapter amounts to as a change of the linear layer's weight, (out, in) float32."""
        return self.strength * self.gain * (self.rows[:, None] * self.B) @ (self.A * self.columns)


class Adapters(nn.ModuleDict):
    """One LoRA for each chosen layer, named "3_q" for q of block 3."""

    def layers(self, dit: WanDiT) -> Iterator[tuple[nn.Linear, LoRA]]:
        """Each adapted linear layer of the model with its LoRA."""
        for name, lora in self.items():
            block, target = name.split("_")
            attention = cast(Any, dit.blocks[int(block)]).self_attn
            yield getattr(attention, target), cast(LoRA, lora)

    def hook(self, dit: WanDiT) -> Iterator[Any]:
        """Let each layer add its LoRA to its output, before norm and RoPE."""
        for linear, lora in self.layers(dit):
            yield linear.register_forward_hook(_add_to_output(lora))

    def set_strength(self, strength: float) -> None:
        """Scale all that the adapters add; 0 is the model without them."""
        for lora in self.values():
            cast(LoRA, lora).strength = strength


def _add_to_output(lora: LoRA) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook; a function of its own, because a loop's variable would change."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + lora(inputs[0])

    return add


def head_rows(heads: Tensor, width: int) -> Tensor:
    """Chosen heads (M,) bool -> their channels (M * width,) bool."""
    return heads.repeat_interleave(width)


def lora_on(
    dit: WanDiT,
    heads: Sequence[Tensor],
    *,
    rank: int,
    alpha: float | None = None,
    targets: str = TARGETS,
    seed: int = 0,
) -> Adapters:
    """New adapters, which change nothing yet, where the model is.

    heads: for each block, which of its heads, (M,) bool; a block without a chosen head gets none. alpha: None means
    rank, so that the gain is 1. targets: some of "qkvo". Raises UserError on other targets or another number of blocks.
    """
    if not targets or not set(targets) <= set(TARGETS):
        raise UserError(f"targets must be some of {TARGETS}, got {targets!r}")
    if len(heads) != dit.config.num_layers:
        raise UserError(f"heads must be chosen for each of {dit.config.num_layers} blocks, got {len(heads)}")
    width = dit.config.dim // dit.config.num_heads
    generator = torch.Generator().manual_seed(seed)
    everything = torch.ones(dit.config.dim, dtype=torch.bool)
    adapters = Adapters()
    for block, chosen in enumerate(heads):
        if not chosen.any():
            continue
        channels = head_rows(chosen.cpu(), width)
        for target in targets:
            rows, columns = (everything, channels) if target == "o" else (channels, everything)
            adapters[f"{block}_{target}"] = LoRA(rows, columns, rank, rank if alpha is None else alpha, generator)
    return adapters.to(dit.patch_embedding.weight.device)


@contextmanager
def attached(dit: WanDiT, *parts: Attachable) -> Iterator[None]:
    """Let the parts change the model inside the `with`, a backward that recomputes blocks included.

    The model must not be compiled: compiled code does not see hooks that come later.
    """
    with ExitStack() as stack:
        for part in parts:
            for handle in part.hook(dit):
                stack.callback(handle.remove)
        yield


@contextmanager
@torch.no_grad()
def merged(dit: WanDiT, *parts: Adapters) -> Iterator[None]:
    """Add the adapters to the weights themselves inside the `with`; behind it the old weights are back, to the bit.

    Raises UserError unless the weights are float32: in bfloat16 most of a small change rounds away.
    """
    saved: dict[nn.Linear, Tensor] = {}
    try:
        for adapters in parts:
            for linear, lora in adapters.layers(dit):
                if linear.weight.dtype != torch.float32:
                    raise UserError(f"adapters can be merged into float32 weights only, got {linear.weight.dtype}")
                if linear not in saved:
                    saved[linear] = linear.weight.clone()
                linear.weight += lora.delta()
        yield
    finally:
        for linear, weight in saved.items():
            linear.weight.copy_(weight)


def save_adapters(path: Path, part: nn.Module, settings: Mapping[str, Any], base: Collection[str]) -> None:
    """Write trained weights with the settings that they need; base: SHA-256 of the model's files (Wan.hashes)."""
    if not base:
        raise UserError("adapters are saved with their model's hashes: load it by load_wan with hash_files=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in part.state_dict().items()}
    metadata = {"settings": json.dumps(settings), "base": json.dumps(sorted(base))}
    save_file(tensors, path, metadata)


def load_adapters(path: Path, base: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of a save_adapters file.

    Raises MissingFile, or UserError if it is no such file or was trained beside other weights than base.
    """
    if not path.is_file():
        raise MissingFile(f"{path} does not exist: give a file that --save has written")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            settings = parse_json(metadata["settings"], str(path))
            trained_beside = json.loads(metadata["base"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
    except (SafetensorError, KeyError, json.JSONDecodeError) as problem:
        raise UserError(f"{path} holds no adapters ({problem}): give a file that --save has written") from None
    if trained_beside != sorted(base):
        raise UserError(f"{path} was trained beside other weights than these: give --model the folder it belongs to")
    return tensors, settings
