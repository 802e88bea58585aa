"""Wan 2.2 A14B: two transformers of Wan 2.1's architecture, one for the noisy half of a run and one for the rest.

They stand behind one module that is called as a WanDiT. A timestep at or above `boundary` goes to the high-noise
expert, one below it to the low-noise expert. So the guided steps of a motion transfer, which are the first ones, fall
to the high-noise expert, and a clean clip (timestep 0) is read by the low-noise one.
Source: Wan-Video/Wan2.2, wan/text2video.py; boundary 0.875 is that of its wan/configs/wan_t2v_A14B.py.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from wan_mini.attention import AttentionFunction, OneProcess
from wan_mini.checkpoint import LOW_NOISE, Checkpoint, Part, read_json
from wan_mini.dit import WanDiT
from wan_mini.errors import MissingFile, UserError
from wan_mini.lora_files import LoraFile

A14B = "Wan2.2-T2V-A14B"
BOUNDARY = 0.875  # of the noise levels
TIMESTEPS = 1000


class Experts(nn.Module):
    """Two WanDiT of one size, each for its noise levels."""

    def __init__(self, high_noise: nn.Module, low_noise: nn.Module, boundary: float):
        super().__init__()
        self.high_noise = cast(WanDiT, high_noise)
        self.low_noise = cast(WanDiT, low_noise)
        self.boundary = boundary
        self.config = self.high_noise.config
        if self.low_noise.config != self.config:
            raise UserError(f"two experts must have one size, got {self.config} and {self.low_noise.config}")

    def at(self, timestep: Tensor) -> WanDiT:
        """The expert for a timestep (B,) in [0,1000]. Raises UserError if a batch needs both."""
        noisy = timestep >= self.boundary * TIMESTEPS
        if noisy.all():
            return self.high_noise
        if noisy.any():
            raise UserError(f"timesteps of a batch must be for one expert, got {timestep.tolist()}: call one by one")
        return self.low_noise

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As WanDiT.forward, by the expert for the timestep."""
        return self.at(timestep)(latents, timestep, text, **options)

    def grid(self, latents: Tensor) -> tuple[int, int, int]:
        """As WanDiT.grid."""
        return self.high_noise.grid(latents)

    def set_attention(self, function: AttentionFunction) -> None:
        """As WanDiT.set_attention, for both."""
        self.high_noise.set_attention(function)
        self.low_noise.set_attention(function)

    @property
    def ranks(self) -> OneProcess:
        """As WanDiT.ranks; both experts have the same."""
        return self.high_noise.ranks

    @ranks.setter
    def ranks(self, ranks: OneProcess) -> None:
        self.high_noise.ranks = ranks
        self.low_noise.ranks = ranks

    @property
    def patch_embedding(self) -> nn.Module:
        """Of the first expert; both are where it is."""
        return self.high_noise.patch_embedding

    @property
    def blocks(self) -> list[nn.Module]:
        """Of both experts."""
        return [*self.high_noise.blocks, *self.low_noise.blocks]


def boundary_of(checkpoint: Checkpoint) -> float:
    """Where the experts change: `boundary_ratio` of Diffusers' model_index.json, else the published 0.875."""
    file = checkpoint.path / "model_index.json"
    boundary = BOUNDARY
    if file.is_file():
        boundary = read_json(file).get("boundary_ratio", BOUNDARY)
    if not isinstance(boundary, float) or not 0 < boundary < 1:
        raise UserError(f"{file}: boundary_ratio must be a number between 0 and 1, got {boundary}")
    return boundary


def check_both_experts(checkpoint: Checkpoint, dit: Part) -> None:
    """Raises MissingFile if a transformer is one of two experts, and the other one is not there."""
    names = [file.relative_to(checkpoint.path).as_posix() for file in dit.files if file != checkpoint.path]
    index = checkpoint.path / "model_index.json"
    alone = any(re.search("high.?noise", name, re.IGNORECASE) for name in names)
    if index.is_file():
        alone = alone or read_json(index).get("boundary_ratio") is not None
    if alone and LOW_NOISE not in checkpoint.parts:
        where = f"get low_noise_model/ of Wan-AI/{A14B}, or transformer_2/ of its Diffusers version"
        raise MissingFile(f"no low-noise expert in {checkpoint.path}, only the high-noise one: {where}")


def loras_for(kind: str, loras: Sequence[LoraFile]) -> list[LoraFile]:
    """The LoRA files for a part, "dit" or LOW_NOISE; one that is for a single expert says so in its name."""
    other = "high" if kind == LOW_NOISE else "low"
    return [lora for lora in loras if not re.search(f"{other}.?noise", lora.path.name, re.IGNORECASE)]


def parts_of(kind: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts of a checkpoint that fill a module, and the module that each fills."""
    if isinstance(module, Experts):
        return [("dit", module.high_noise), (LOW_NOISE, module.low_noise)]
    return [(kind, module)]
