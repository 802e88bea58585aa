"""The tiny model's language: a tokenizer of the world's captions, in the format of the official tokenizer.json."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wan_mini.tokenizer import MARK, Tokenizer
from wan_mini.umt5 import UMT5Encoder

SPECIAL = ("<pad>", "</s>", "<unk>")  # numbers 0, 1, 2 as in UMT5
CHARACTERS = (MARK, *map(chr, range(33, 127)))  # printable ASCII; the mark is a space


def grammar_tokenizer(captions: Sequence[str]) -> dict:
    """A unigram tokenizer: the captions' words, scored by log frequency, and below them every single character."""
    texts = (MARK + caption.replace(" ", MARK) for caption in captions)
    counts = Counter(piece for text in texts for piece in re.findall(rf"{MARK}[a-zA-Z]+|[.,]", text))
    total = counts.total()
    scores = dict.fromkeys(CHARACTERS, -math.log(total) - 1)  # less than a word seen once
    return tokenizer_json(scores | {piece: math.log(count / total) for piece, count in sorted(counts.items())})


def tokenizer_json(scores: dict[str, float]) -> dict:
    """A unigram tokenizer of these pieces and scores, in the format of the official tokenizer.json."""
    metaspace = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "always", "split": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token, **flags} for number, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [*([token, -0.0] for token in SPECIAL), *scores.items()]},
    }


def casual(caption: str) -> str:
    """A caption as one would type it: no capital, no full stop. Half of the training captions are such."""
    return caption[0].lower() + caption[1:].rstrip(".")


def token_table(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """(N,L) ids of the texts, padded with 0 to the longest."""
    rows = [torch.tensor(tokenizer.encode(text)) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)


def encode_text(encoder: UMT5Encoder, ids: Tensor) -> Tensor:
    """Token ids (B,L), 0 for padding -> (B,L,C), zeros at padding, as the DiT expects them."""
    mask = (ids != 0).long()
    return encoder(ids, mask) * mask[..., None]
