"""A loss that teaches the first blocks of a DiT to tell what each token shows a part of, and where the whole is.

A small model draws sharp edges and corners long before its tokens agree on whose edges they are: rings with two holes,
stars with the arms of a cross. The world knows which shape is where and of which color, so the agreement can be asked
for. A linear layer gives the answer; nobody needs it afterwards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.tiny.world import BAR, COLORS, SHAPES, TOKEN, patch_centers, plan_clip

FIGURES = (*SHAPES.values(), BAR)  # what a token may show a part of: numbers 1, 2, ...; 0 is nothing
RANGE = 1.35  # how far a figure's tips reach, in its size: tokens within that of its center belong to it
LATENT = 8  # pixels: a position of a latent
ANSWERS = [1 + len(FIGURES), len(COLORS), 3]  # of a reader: the figure or none, its color, where and how large


def true_parts(seed: int, times: Sequence[int], split: str = "train") -> np.ndarray:
    """What each token of a clip shows a part of in each of the frames `times`.

    -> (times,S,5) float32: the number of the figure whose center is nearest, of FIGURES; its color's, of COLORS; from
    the token's middle to that center, right and down, in the figure's size; that size in tokens. Numbers begin at 1;
    all are 0 where no figure is within RANGE.
    """
    times, middle = np.array(times), patch_centers(TOKEN).flatten()  # (T,), (S,)
    parts, nearest = np.zeros((len(times), len(middle), 5), np.float32), np.full((len(times), len(middle)), RANGE)
    for sprite in plan_clip(seed, split=split).motion.sprites:
        size = np.abs(sprite.pose.turn[times, None])  # (T,1)
        way = (sprite.pose.shift[times, None] - middle) / size  # (T,S)
        number = next(i for i, figure in enumerate(FIGURES, 1) if figure is sprite.shape)
        color = 1 + [*COLORS].index(sprite.color)
        part = np.stack(np.broadcast_arrays(number, color, way.real, way.imag, size / TOKEN), axis=-1)  # (T,S,5)
        nearer = np.abs(way) < nearest
        parts, nearest = np.where(nearer[..., None], part, parts), np.where(nearer, np.abs(way), nearest)
    return parts.astype(np.float32)


def near_sprites(seed: int, times: Sequence[Sequence[int]], split: str = "train") -> np.ndarray:
    """Whether a position of a latent shows some of a sprite in any of its frames: (len(times),h,w) bool.

    times: the frames of each latent frame. A position does if its middle is on a sprite, or less than LATENT / 2 pixels
    from one.
    """
    z, sprites = patch_centers(LATENT), plan_clip(seed, split=split).motion.sprites  # (h,w)
    shows = np.zeros((len(times), *z.shape), bool)
    for frame, group in enumerate(times):
        for sprite in sprites:
            pose = sprite.pose.at(np.array(group)[:, None, None])  # (group,1,1)
            shows[frame] |= (np.abs(pose.turn) * sprite.shape.distance(pose.invert(z)) < LATENT / 2).any(0)  # (h,w)
    return shows


def reader(dim: int) -> nn.Module:
    """What reads a token's part off its channels: (...,dim) -> (...,1 + figures + colors + 3)."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, sum(ANSWERS)))


def parts_loss(guess: Tensor, parts: Tensor) -> Tensor:
    """How badly a reader's guess (B,N,1+figures+colors+3) tells the parts (B,N,5) of `true_parts`.

    Cross-entropy of the figure, of tokens with one and (half of it) of those without, and for tokens with one that of
    the color and twice the mean absolute error of where and how large it is.
    """
    found, numbers = parts[..., 0] > 0, parts[..., :2].long()  # (B,N), (B,N,2)
    figure, color, where = guess.split(ANSWERS, dim=-1)
    wrong = F.cross_entropy(figure.flatten(0, 1), numbers[..., 0].flatten(), reduction="none").view(found.shape)
    paint = F.cross_entropy(color.flatten(0, 1), (numbers[..., 1] - 1).clamp(0).flatten(), reduction="none")
    off = (where - parts[..., 2:]).abs().mean(-1)  # (B,N,3) -> (B,N)
    each = wrong + paint.view(found.shape) + 2 * off
    return (each * found).sum() / found.sum().clamp(1) + 0.5 * wrong[~found].mean()


@contextmanager
def stream_after(block: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets what a block passes on, at each of its passes while this is open.

    Only training needs it, so that dit.py does not know.
    """
    streams = []
    hook = block.register_forward_hook(lambda block, inputs, stream: streams.append(stream))
    try:
        yield streams
    finally:
        hook.remove()
