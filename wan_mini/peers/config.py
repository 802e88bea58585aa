"""The options that all training-free peers have."""

import math
from dataclasses import dataclass
from typing import ClassVar

from wan_mini.dit import WanDiT
from wan_mini.errors import check_choice, check_range
from wan_mini.pipeline import SamplingConfig


@dataclass(frozen=True)
class PeerConfig(SamplingConfig):
    """The options that all training-free peers have, with those of sampling; the defaults are DiTFlow's schedule."""

    REFERENCES: ClassVar[tuple[str, ...]] = ("clean", "noised")

    guidance_fraction: float = 0.2  # share of the steps, from the first, that is guided
    optim_steps: int = 5  # latent updates in a guided step, each with a gradient of its own
    lr: tuple[float, float] = (0.002, 0.0011)  # Adam's first and last rate
    lr_over: str = "steps"  # whether the rate falls from guided step to guided step, or over the "updates" in each
    block: int | None = None  # that is read; None: the middle one, 14 of 30
    reference: str = "clean"  # read once without noise, or "noised" as the latents are, at each step

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("guidance_fraction", self.guidance_fraction, 0, 1)
        check_range("optim_steps", self.optim_steps, 1)
        check_range("lr", self.lr)
        check_choice("lr_over", self.lr_over, ("steps", "updates"))
        check_choice("reference", self.reference, self.REFERENCES)

    @property
    def guided_steps(self) -> int:
        """Number of guided denoising steps."""
        return math.ceil(round(self.guidance_fraction * self.steps, 6))  # 0.2 * 15 is a little more than 3

    @property
    def reference_sigma(self) -> float | None:
        """Noise level at which the reference is read once; None: at that of each step."""
        return 0.0 if self.reference == "clean" else None

    def block_of(self, dit: WanDiT) -> int:
        """The block that is read; by default 14 of 30, and the middle one of other depths."""
        count = dit.config.num_layers
        block = (count - 1) // 2 if self.block is None else self.block
        check_range("block", block, 0, count - 1)
        return block

    def rates(self, index: int) -> list[float]:
        """Adam's rate at each update of guided step `index`."""
        count = self.optim_steps if self.lr_over == "updates" else self.guided_steps
        rates = []
        for update in range(self.optim_steps):
            position = update if self.lr_over == "updates" else index
            rates.append(self.lr[0] + (self.lr[1] - self.lr[0]) * position / max(count - 1, 1))
        return rates

    def travel(self) -> float:
        """Sum of rates over all updates: about the farthest that Adam can move a latent value."""
        return sum(sum(self.rates(index)) for index in range(self.guided_steps))
