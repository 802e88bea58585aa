"""MOFT (arXiv 2405.14864): features without what all frames share, in the channels that change most.

The form is that of DiTFlow's code, which is what tables call MOFT: token by token, at the same position. So it hands
on where something happens, layout included. The original compares means of a region, and descends without Adam.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan_mini.errors import check_positive
from wan_mini.peers.config import PeerConfig
from wan_mini.peers.guidance import StreamGuidance

AT_REST = 1e-3  # of the root mean square of the reference's features: what is smaller has no direction


@dataclass(frozen=True)
class MOFTConfig(PeerConfig):
    """Options of MOFT; schedule and share are those of DiTFlow's code."""

    channels: float = 0.04  # share of the channels that is compared: 61 of 1536

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("channels", self.channels, at_most=1)


class Target(NamedTuple):
    """What the reference asks for."""

    changes: Tensor  # (F,S,K)
    channels: Tensor  # (K,) numbers


class MOFT(StreamGuidance):
    """Lowers 1 minus the mean cosine of the changing channels, token by token."""

    history = (*StreamGuidance.history, "chosen")
    chosen: tuple[int, ...] = ()

    def target_of(self, features: Tensor) -> Target:
        """The reference's changes in the channels that change most, (F,S,C) -> Target."""
        changes = without_mean(features)
        channels = motion_channels(changes, self.config.channels)
        if not channels.is_meta:
            self.chosen = tuple(channels.tolist())
        return Target(changes[..., channels], channels)

    def distance(self, features: Tensor, target: Target) -> Tensor:
        """See change_distance."""
        return change_distance(without_mean(features)[..., target.channels], target.changes)

    def report(self) -> dict[str, Any]:
        """With the channels."""
        return super().report() | {"channels": self.chosen}


def without_mean(features: Tensor) -> Tensor:
    """What a token's features have beyond their mean over the frames: (F,S,C) -> (F,S,C)."""
    return features - features.mean(0)


def motion_channels(changes: Tensor, share: float) -> Tensor:
    """The share of the channels that weigh most in the first principal component of changes (F,S,C) -> (K,) sorted."""
    flat = changes.flatten(0, 1)  # (F,S,C) -> (N,C)
    _, vectors = torch.linalg.eigh(flat.mT @ flat)  # (C,C): right singular vectors of `flat`, the largest last
    count = max(1, int(share * flat.shape[1]))
    return vectors[:, -1].abs().topk(count).indices.sort().values


def change_distance(changes: Tensor, reference: Tensor) -> Tensor:
    """1 minus the mean cosine over channels: changes (F,S,K) of both videos -> (), in [0, 2].

    A token at rest in either counts as a cosine of 0, without the huge gradients of a direction that is none.
    """
    floor = AT_REST * reference.square().sum(-1).mean().sqrt()
    floor = floor.clamp(min=1e-8).square()
    one = changes * (changes.square().sum(-1, keepdim=True) + floor).rsqrt()  # (F,S,K), of length 1
    other = reference * (reference.square().sum(-1, keepdim=True) + floor).rsqrt()
    return 1 - (one * other).sum(-1).mean()
