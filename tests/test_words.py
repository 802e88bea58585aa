"""Which words belong together, against the scenes that the captions tell of, and the loss by its definition."""

import pytest
import torch
from torch import nn

from wan_mini.config import TINY_UMT5
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.grammar import casual, grammar_tokenizer, token_table
from wan_mini.tiny.words import NOUNS, lexicon, spoken_pairs, word_reader, words_loss
from wan_mini.tiny.world import COLORS, KINDS, LIMBS, SHAPES, SPLITS, make_clip
from wan_mini.tokenizer import Tokenizer
from wan_mini.umt5 import UMT5Encoder

FIGURES = [*SHAPES, *LIMBS]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(next(CHECKPOINT.rglob("tokenizer.json")))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_pairs_of_a_caption_are_the_objects_of_its_scene(tokenizer, kind, split):
    """Each is said twice, by its color and by its noun, which stand side by side."""
    known, scenes = lexicon(tokenizer, TINY_UMT5.vocab), [make_clip(n, kind, split, frames=[]) for n in range(40)]
    for style in (str, casual):
        ids = token_table(tokenizer, [style(scene.caption) for scene in scenes])
        pairs = spoken_pairs(ids, known)
        assert pairs.shape == (*ids.shape, 2)
        for scene, row in zip(scenes, pairs.tolist()):
            said = [(FIGURES[figure - 1], [*COLORS][color - 1]) for figure, color in row if figure or color]
            assert said[::2] == said[1::2] == list(scene.objects)


def test_words_that_are_not_side_by_side_are_no_pair(tokenizer):
    known = lexicon(tokenizer, TINY_UMT5.vocab)
    for text in ("", "Sand.", "a red", "star, red", "A star on red sand", "blue grey tiles", "red and star"):
        assert not spoken_pairs(token_table(tokenizer, [text]), known).any(), text


def test_a_tokenizer_without_the_words_knows_none(tmp_path):
    """They fall into characters, of which none may be taken for a word."""
    known = lexicon(Tokenizer(grammar_tokenizer(["a red star"])), 256)
    assert [int((table > 0).sum()) for table in known] == [1, 1]


def test_the_loss_by_hand():
    """Four tokens, two of them words of pairs: figure 3 in color 6, figure 8 in color 1."""
    guess = torch.randn(1, 4, 8 + 6, generator=torch.Generator().manual_seed(0))
    pairs = torch.tensor([[[0, 0], [3, 6], [0, 0], [8, 1]]])
    figure, color = guess[0, :, :8].log_softmax(-1), guess[0, :, 8:].log_softmax(-1)
    wanted = -(figure[1, 2] + color[1, 5] + figure[3, 7] + color[3, 0]) / 2
    assert words_loss(guess, pairs).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert words_loss(guess, torch.zeros_like(pairs)).item() == 0


def test_a_new_encoder_learns_what_belongs_together(tokenizer):
    """Of captions it has not seen, with two objects or three: 9 of 10 colors are those of their nouns."""
    known = lexicon(tokenizer, TINY_UMT5.vocab)
    captions = [make_clip(seed, "several", frames=[]).caption for seed in range(500)]
    ids = token_table(tokenizer, captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({"text": UMT5Encoder(TINY_UMT5), "reader": word_reader(TINY_UMT5.dim)})
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        rows = ids[torch.arange(32) + 32 * step % 384]
        words_loss(model["reader"](model["text"](rows, (rows != 0).long())), spoken_pairs(rows, known)).backward()
        adam.step()
        adam.zero_grad()
    rows = ids[420:]
    pairs = spoken_pairs(rows, known)
    nouns = (pairs[..., 0] > 0) & (known.figures[rows] > 0)  # (B,L)
    guess = model["reader"](model["text"](rows, (rows != 0).long()))[nouns][:, len(NOUNS) :].argmax(-1)
    assert (guess + 1 == pairs[nouns][:, 1]).float().mean() > 0.9
