"""Prompts: clean_prompt against recorded results of ftfy, and the text vectors of whole prompts."""

import pytest
import torch

from wan_mini import prompts
from wan_mini.load import load_tokenizer
from wan_mini.prompts import clean_prompt, encode_prompts
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.unknown_words import note_unknown_words

CPU = torch.device("cpu")
NEGATIVE = (  # the default negative prompt of Wan 2.1, wan/configs/shared_config.py
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)


@pytest.mark.parametrize(
    ("raw", "cleaned"),  # recorded from Wan 2.1's whitespace_clean(basic_clean(text)) with ftfy 6.3.1
    [
        (NEGATIVE, NEGATIVE.replace("，", ",")),
        ("“It’s” a ‘cat’ ‟sitting‛", "\"It's\" a 'cat' \"sitting'"),
        ("ﬁne coﬀee ﬆill ﬅ ǆ Ĳ ŉ", "fine coffee still ſt dž IJ 'n"),
        ("ＦＵＬＬ　ｗｉｄｔｈ！ ｶﾞﾊﾟ ￥ ￣ ﾡ", "FULL width! ガパ ¥ ̄ ᄀ"),
        ("10² ① ℃ ™ ½ …", "10² ① ℃ ™ ½ …"),
        ("  a\t\tcat \r\n\u2028 runs\xa0\u3000fast\u200b ", "a cat runs fast\u200b"),
        ("&lt;b&gt; &amp;amp; &quot;x&quot; &#39;y&#39; &nbsp; &hellip; &eacute", "<b> & \"x\" 'y' … é"),
        ("&amp;ldquo;hi&amp;rdquo; &#8217; &#x2019;", "\"hi\" ' '"),
        ("<i>&rsquo;</i> &amp;amp;amp;", "<i>’</i> &amp;"),
        ("e\u0301 A\u030a \u1100\u1161", "é Å 가"),
        ("\x1b[31mred\x1b[0m a\x07b\ufeff\ufffc", "red ab"),
        ("\ud83c\udfac \ud800", "🎬 \ufffd"),
        ("caf\x92 \x85 \x80", "caf' … €"),
        ("👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️ मैं", "👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️ मैं"),
        (" \n ", ""),
    ],
)
def test_clean_prompt_equals_ftfy(raw, cleaned):
    assert clean_prompt(raw) == cleaned


def test_clean_prompt_does_not_guess_encodings():
    assert clean_prompt("cafÃ© &NTILDE;") == "cafÃ© &NTILDE;"  # ftfy: "café Ñ"


def test_the_negative_prompt_is_the_originals():
    assert prompts.NEGATIVE == NEGATIVE and len(NEGATIVE) == 137 and NEGATIVE.count("，") == 27


def test_each_prompt_is_encoded_alone(wan):
    """One after the other, cleaned, neither padded nor masked; so a prompt's vectors do not depend on the others."""
    short, spaced, empty = encode_prompts(wan, ["a cat", "  a \n cat ", ""], CPU)
    ids = torch.tensor([wan.tokenizer.encode("a cat")])  # (1, 7): one token a character here, and </s>
    assert short.equal(wan.text_encoder(ids, torch.ones_like(ids))) and short.shape == (1, 7, 16)
    assert spaced.equal(short) and not short.requires_grad
    assert empty.shape == (1, 1, 16)  # </s> alone
    assert encode_prompts(wan, [], CPU) == []


def test_a_prompt_that_is_too_long_loses_its_end_but_not_its_end_of_text(wan, capsys):
    (long,) = encode_prompts(wan, ["x" * 100], CPU)
    assert "note: the prompt has 102 tokens, the model reads 64: its end is cut off" in capsys.readouterr().out
    (fits,) = encode_prompts(wan, ["x" * 62], CPU)  # 64 tokens with the mark in front and </s>
    (note,) = capsys.readouterr().out.splitlines()  # of a word that is spelled, and of nothing else
    assert note.startswith("note: the model has no token for xxxxxxxxxxxxxxxxxxxx:")
    assert long.shape[1] == wan.dit.config.text_len == 64 and long.equal(fits)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("A picture of a red ring on grass.", None),
        ("a corgi surfing at sunset", "corgi, surfing, sunset"),
        ("一只狗 on grass", "一只狗"),
        ("three " * 7 + "x" * 30, "three, three, three, three, three and 3 more"),
        ("x" * 30, "x" * 20),
    ],
)
def test_words_that_the_model_cannot_read_are_named(prompt, named, capsys):
    tokenizer = load_tokenizer(CHECKPOINT)
    note_unknown_words(tokenizer, prompt)
    printed = capsys.readouterr().out
    assert printed == (
        "" if named is None else f"note: the model has no token for {named}: it may not know what is meant\n"
    )


def test_each_prompt_is_searched_for_words_that_the_model_cannot_read(wan, capsys):
    encode_prompts(wan, ["a", "corgi", ""], CPU)  # this model has letters only
    assert capsys.readouterr().out.count("note: the model has no token for corgi:") == 1


def test_offloaded_blocks_give_the_same_vectors(wan):
    weights = [id(weight) for weight in wan.text_encoder.parameters()]
    (whole,) = encode_prompts(wan, ["a cat"], CPU)
    (offloaded,) = encode_prompts(wan, ["a cat"], CPU, offload_blocks=True)
    assert offloaded.equal(whole)
    assert [id(weight) for weight in wan.text_encoder.parameters()] == weights  # and the model is as before
