"""Which block's queries and keys are read, and whether two blocks are better than one.

Hypothesis, written before any run. Matches are poor in the first block, where tokens know only their own patch, best in
the middle and no better in the last, as in the paper's Fig. 7; a gradient through fewer blocks is also smoother, so the
block before the best one is as good at the same travel. The cost grows linearly with the block. A second block adds
nothing to the best one: its flow is that of the same motion, only less exact.
Limit: of several blocks each has a forward pass of its own, although one pass could read them all.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.metrics.points import Point
from benchmarks.studies.program import run_study
from fastvmt import FastVMT, MotionConfig, gradient_of
from wan_mini.config import TINY
from wan_mini.load import Wan
from wan_mini.pipeline import Transfer
from wan_mini.runs.cli import run
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.transfer import transfer_with


@dataclass(frozen=True)
class BlocksConfig(MotionConfig):
    """The options of a transfer that reads several blocks."""

    beside: tuple[int, ...] = ()  # blocks that are read besides `block`


class SeveralBlocks(FastVMT):
    """FastVMT with the mean of several blocks' losses; each block has its own flow and windows."""

    config: BlocksConfig

    def prepare(self) -> None:
        """A FastVMT of each further block. They share the records, so that spent() counts all gradients."""
        self.others: list[FastVMT] = []
        super().prepare()
        for block in self.options.beside:
            config = replace(self.options, block=block, beside=())
            other = FastVMT(self.dit, self.reference, self.noise, self.text, self.empty_text, config, self.recompute)
            other.losses, other.gradients = self.losses, self.gradients
            self.others.append(other)

    def choose_tokens(self, phase: int) -> None:
        """Let all blocks see the same tokens."""
        super().choose_tokens(phase)
        for other in self.others:
            other.choose_tokens(phase)

    def target_at(self, sigma: Tensor, timestep: Tensor) -> Any:
        """A target of each block."""
        targets = [super().target_at(sigma, timestep)]
        for other in self.others:
            targets.append(other.target_at(sigma, timestep))
        return targets

    def loss(self, latents: Tensor, timestep: Tensor, target: Any, norms: dict[str, float]) -> Tensor:
        """The mean of the blocks' losses (Eq. 8) -> ()."""
        total = super().loss(latents, timestep, target[0], norms)
        for other, other_target in zip(self.others, target[1:], strict=True):
            total = total + other.loss(latents, timestep, other_target, norms)
        return total / len(target)

    def spent(self) -> dict[str, Any]:
        """Gradients and passes as of one block, the operations of all."""
        spent = super().spent()
        for other in self.others:
            flops = other.spent()["flops"]
            spent["flops"]["guidance"] += flops["guidance"]
            spent["flops"]["flow"] += flops["flow"]
        return spent


def transfer_blocks(wan: Wan, clip: np.ndarray, prompt: str, config: BlocksConfig, **options: Any) -> Transfer:
    """fastvmt.transfer that reads several blocks."""
    return transfer_with(SeveralBlocks, gradient_of(config), wan, clip, prompt, config, **options)


def points() -> dict[str, Point]:
    """Every block, and the default's with each of its neighbors."""
    _, preset = load_preset(CHECKPOINT, MotionConfig())
    made = {}
    for block in range(TINY.num_layers):
        made[f"block {block}"] = Point(replace(preset, block=block))
    for first, second in ((2, 3), (3, 4)):
        config = BlocksConfig(**{**vars(preset), "block": second, "beside": (first,)})
        made[f"blocks {first} and {second}"] = Point(config, transfer=transfer_blocks)
    return made


def program(argv: list[str] | None = None) -> None:
    """Run what the CSV lacks, print the table."""
    run_study("blocks", __doc__, points(), "block 3", argv)


if __name__ == "__main__":
    raise SystemExit(run(program))
