"""A loss that teaches the text encoder which color goes with which noun.

In "a red star and a blue ring" only the order of the words tells what is red. A large text encoder has learnt that by
reading. Ours learnt from pictures, where a pair mixed up costs little: after 18,600 steps a linear layer told a noun's
color from its vector no better than by chance. So here both words of a pair are asked for the pair.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_mini.tiny.world import COLORS, LIMBS, SHAPES
from wan_mini.tokenizer import Tokenizer

NOUNS = [*(shape.nouns for shape in SHAPES.values()), *((limb,) for limb in LIMBS)]  # of figures 1, 2, ...


class Lexicon(NamedTuple):
    """What each token of a tokenizer says: the number, from 1, of a figure of NOUNS or of a color; 0 is neither."""

    figures: Tensor  # (vocabulary,)
    colors: Tensor  # (vocabulary,)


def lexicon(tokenizer: Tokenizer, size: int) -> Lexicon:
    """The lexicon of a vocabulary of that size. A noun of two words is known by its first.

    A word without a token of its own is left out: no caption that made the tokenizer has it.
    """
    tables = torch.zeros(2, size, dtype=torch.long)
    for table, names in zip(tables, (NOUNS, [(color,) for color in COLORS])):
        for number, words in enumerate(names, 1):
            for word in words:
                token = tokenizer.encode(word)[0]
                if tokenizer.decode([token]) == word.split()[0]:
                    table[token] = number
    return Lexicon(*tables)


def spoken_pairs(ids: Tensor, known: Lexicon) -> Tensor:
    """For each token of ids (B,L) figure and color of the pair that it is a word of, (B,L,2); 0, 0 if it is of none.

    A pair is a color and the noun behind it.
    """
    color, figure = known.colors[ids[:, :-1]], known.figures[ids[:, 1:]]  # (B,L-1) each: a token, and the next one
    pairs = torch.stack([figure, color], dim=-1) * ((figure > 0) & (color > 0))[..., None]  # (B,L-1,2)
    return F.pad(pairs, (0, 0, 0, 1)) + F.pad(pairs, (0, 0, 1, 0))  # the color's and the noun's: (B,L,2)


def word_reader(dim: int) -> nn.Module:
    """What reads a pair off a token's vector: (...,dim) -> (...,figures + colors)."""
    return nn.Linear(dim, len(NOUNS) + len(COLORS))


def words_loss(guess: Tensor, pairs: Tensor) -> Tensor:
    """How badly a reader's guess (B,L,figures+colors) tells the pairs (B,L,2): cross-entropy of figure and color.

    The mean over the words of pairs; 0 if there are none.
    """
    said = pairs[..., 0] > 0  # (B,L)
    figure, color = guess[said].split([len(NOUNS), len(COLORS)], dim=-1)  # (n,figures), (n,colors)
    numbers = pairs[said] - 1  # (n,2)
    wrong = (F.cross_entropy(part, n, reduction="sum") for part, n in ((figure, numbers[:, 0]), (color, numbers[:, 1])))
    return sum(wrong) / said.sum().clamp(1)
