"""What a method with adapters asks of the program around it: frames to encode, parts to train, and how they act."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from wan_mini.peers.fit import Stage

FrameSets = dict[str, list[Sequence[int]]]  # {name: clips as numbers of video frames}
Clips = dict[str, list[Tensor]]  # the same encoded, (1,16,F,h,w) each, and the whole clip as "whole"


def nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Plan:
    """Parts to train beside a model, and the stages that train them."""

    parts: nn.ModuleDict  # each lora.Attachable, with a set_strength; in the file of adapters under these names
    stages: list[Stage]
    strengths: tuple[float, ...]  # of each part when a video is made
    report: dict[str, Any] = field(default_factory=dict)  # for run.json, and for loading the parts again
    prepare: Callable[[], None] = nothing  # called between training and sampling


def single_frames(frames: int) -> list[Sequence[int]]:
    """Each video frame as a clip of its own."""
    return [range(index, index + 1) for index in range(frames)]
