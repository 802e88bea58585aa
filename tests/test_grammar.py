"""The tokenizer of the tiny model's captions."""

import re
import string

import pytest

from wan_mini.config import TINY_UMT5
from wan_mini.tiny import world
from wan_mini.tiny.training.grammar import casual, grammar_tokenizer, token_table
from wan_mini.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [world.make_clip(seed, frames=[]).caption for seed in range(500)]


@pytest.fixture(scope="module")
def tokenizer(captions) -> Tokenizer:
    return Tokenizer(grammar_tokenizer([*captions, *map(casual, captions)]))


def test_one_piece_a_word(tokenizer, captions):
    nouns = [noun for thing in (*world.SHAPES.values(), *world.BACKGROUNDS.values()) for noun in thing[-1]]
    for text in [*captions, *map(casual, captions), *world.COLORS, *nouns]:
        ids = tokenizer.encode(text)
        assert len(ids) == len(re.findall(r"\w+|[.,]", text)) + 1, text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.pieces) <= TINY_UMT5.vocab


def test_any_ascii_prompt_encodes(tokenizer):
    for text in (string.printable.strip(), "Xylophones, 42% of them: {Zebra}!", "reddish discus"):
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id not in ids
        assert tokenizer.decode(ids) == text


def test_casual_captions():
    assert casual("A red disc on sand.") == "a red disc on sand"


def test_token_table_is_padded_with_zeros(tokenizer):
    table = token_table(tokenizer, ["a red disc", ""])
    assert table.shape == (2, 4) and table[1].tolist() == [1, 0, 0, 0]
