"""Space-Time Features, here SMM (arXiv 2311.17009): how the mean feature of a frame changes from frame to frame.

Frame i is described by the mean of its tokens' features, m_i; the changes m_j - m_i shall point the same way as in the
reference. What a mean over the frame cannot see, the method cannot ask for: where an object moves over an even
background.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_mini.errors import check_choice
from wan_mini.peers.config import PeerConfig
from wan_mini.peers.guidance import StreamGuidance

VARIANTS = ("mended", "published", "ditflow")


@dataclass(frozen=True)
class SMMConfig(PeerConfig):
    """Options of SMM; the schedule is the published code's, without its inversion and its restarts."""

    guidance_fraction: float = 0.4
    optim_steps: int = 10
    lr: tuple[float, float] = (0.007, 0.004)
    # "published" counts i = j as a cosine of 0, so that 1/F is the least. "ditflow" is the port in DiTFlow's code: the
    # video's changes start at the reference's m_i, and cosines run over time, channel by channel.
    variant: str = "mended"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, VARIANTS)


class SMM(StreamGuidance):
    """Lowers 1 minus the mean cosine of the changes of frame means."""

    def target_of(self, features: Tensor) -> Tensor:
        """Mean feature of each frame, (F,S,C) -> (F,C)."""
        return features.mean(1)

    def distance(self, features: Tensor, target: Tensor) -> Tensor:
        """See mean_distance."""
        return mean_distance(features.mean(1), target, self.config.variant)


def mean_distance(means: Tensor, reference: Tensor, variant: str = "mended") -> Tensor:
    """1 minus the mean cosine of m_j - m_i in both videos: frame means (F,C) each -> ().

    In [0, 2]; unchanged by a constant vector added to all frames, and by a positive factor.
    """
    if variant == "ditflow":
        target = reference - reference[:, None]  # (F,C), (F,1,C) -> (F,F,C): from i to j
        change = means - reference[:, None]
        return 1 - F.cosine_similarity(change, target, dim=1).mean()  # (F,F,C) -> (F,C), over j
    frames = len(reference)
    i, j = torch.triu_indices(frames, frames, 1, device=means.device)  # j to i has the cosine of i to j
    cosines = F.cosine_similarity(means[j] - means[i], reference[j] - reference[i], dim=-1)  # (pairs,C) -> (pairs,)
    if variant == "published":
        return 1 - 2 * cosines.sum() / frames**2
    return 1 - cosines.mean()
