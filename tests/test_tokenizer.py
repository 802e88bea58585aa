"""The tokenizer against the `tokenizers` package on models that sentencepiece trains."""

import base64
import io
import json
import random
import unicodedata

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from wan_mini.errors import MissingFile, UserError
from wan_mini.tokenizer import Tokenizer, _CharsMap

SENTENCES = (
    "the quick brown fox jumps over a lazy dog in morning light, running runner walks walking video of cat. "
    "一只猫在草地上奔跑。 阳光明媚， fine coffee naïve café Ünïcode Привет мир こんにちは 世界 カタカナ 안녕하세요 "
    "세계 हिन्दी भाषा สวัสดี مرحبا"
)
WORDS = SENTENCES.split()
# fmt: off
POOLS = [
    WORDS,
    list("abcdefghijklmnopqrstuvwxyz.,!?'\"<>&;0123456789-_▁"),
    list("一只猫在草地上奔跑阳光明媚，。龘𠀋𡈽"),
    list("ｆｕｌｌ　ｗｉｄｔｈＡ１ﾊﾟｶﾞ￥"),
    ["👍🏽", "👩‍👩‍👧", "🇩🇪", "🇫🇷🇩", "❤️", "☺", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "1️⃣", "™", "©", "🎬"],
    ["e\u0301", "a\u0308\u0323", "½\u0301", "①\u0308\u0308", "ﬁ", "ǆ\u030c", "\u0344",
     "\u0301", "\u200d", "\ufe0f", "Å", "…", "²"],
    ["\0", "\1", "\t", "\n", "\r\n", "\r", "\v", "\x1f",
     "\x7f", "\x85", "\xa0", "\xad", "\u200b", "\u2028", "\ufeff", "\u3000"],
    ["क्ष", "श्री", "क्‍ष", "ड़", "हिन्दी", "\u0600", "½ः", "\u06dd١",
     "\u1100", "\u1161", "\u11a8", "각", "ㄱ", "½ำ", "กำ", "½ာ"],
    [" ", "  ", "   ", "<pad>", "</s>", "<unk>", "<extra_id_0>",
     "<extra_id_1>", "<extra_id_", "<0x41>", "<beyond>", "<beyond>s"],
    ["a" * 150, "猫" * 90, "xyzzy" * 30, "龘" * 40],
]
# fmt: on
PLAIN = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def random_texts(count: int, seed: int) -> list[str]:
    """Random strings over all pools, with and without spaces between the parts; the first three are all but empty."""
    rng = random.Random(seed)
    joined = (
        "".join(rng.choice(rng.choice(POOLS)) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 12)))
        for _ in range(count)
    )
    return ["", " ", "  ", *joined]


def train(byte_fallback: bool) -> sentencepiece_model_pb2.ModelProto:
    """A small unigram model with sentencepiece's own normalizer (its default, nmt_nfkc), trained in a moment."""
    rng, written = random.Random(0), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(2000)),
        model_writer=written,
        vocab_size=600,
        hard_vocab_limit=False,
        character_coverage=0.98,  # leaves rare characters unknown
        byte_fallback=byte_fallback,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())


@pytest.fixture(scope="module", params=[False, True], ids=["unk", "bytes"])
def proto(request) -> sentencepiece_model_pb2.ModelProto:
    return train(byte_fallback=request.param)


def t5_file(proto, path, form: str) -> tokenizers.Tokenizer:
    """Save what a T5 converter writes for a sentencepiece model, in one of its historic forms; return the truth."""
    charsmap = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    one_space = normalizers.Replace(Regex(" {2,}"), " ")
    one_mark = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    mark, bare = pre_tokenizers.Metaspace(), pre_tokenizers.Metaspace(prepend_scheme="never")
    normalizer, pre_tokenizer = {
        "charsmap": (charsmap, mark),
        "umt5": (normalizers.Sequence([one_space]), mark),
        "one space": (normalizers.Sequence([charsmap, one_space]), mark),
        "one mark": (normalizers.Sequence([charsmap, *one_mark]), mark),
        "words": (charsmap, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), mark])),
        "no prefix": (None, bare),
    }[form]
    extra = [f"<extra_id_{index}>" for index in reversed(range(20))]
    vocab = [(piece.piece, piece.score) for piece in proto.pieces] + [(piece, 0.0) for piece in extra]
    truth = tokenizers.Tokenizer(models.Unigram(vocab, 2, proto.trainer_spec.byte_fallback))
    if normalizer:
        truth.normalizer = normalizer
    truth.pre_tokenizer = pre_tokenizer
    truth.decoder = decoders.Metaspace(prepend_scheme="never" if pre_tokenizer is bare else "always")
    truth.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    strips = form == "no prefix"  # as the slow T5Tokenizer declares its extra ids
    special = [
        AddedToken(piece, lstrip=strips, rstrip=strips, normalized=False)
        for piece in ["<pad>", "</s>", "<unk>", *extra]
    ]
    truth.add_special_tokens(special)
    truth.add_tokens([AddedToken(piece, normalized=False) for piece in ["<beyond>", "<beyond>s"]])
    truth.save(str(path))
    return truth


@pytest.mark.parametrize(
    ("form", "count"),
    [("charsmap", 2000), ("umt5", 300), ("one space", 300), ("one mark", 300), ("words", 300), ("no prefix", 300)],
)
def test_ids_and_text_equal_the_tokenizers_package(proto, tmp_path, form, count):
    truth = t5_file(proto, tmp_path / "tokenizer.json", form)
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")
    texts = random_texts(count, seed=count + proto.trainer_spec.byte_fallback)
    ids = [truth.encode(text).ids for text in texts]
    assert [text for text, expected in zip(texts, ids, strict=True) if ours.encode(text) != expected] == []
    ids += [random.Random(seed).choices(range(truth.get_vocab_size()), k=8) for seed in range(100)]
    assert [row for row in ids if ours.decode(row) != truth.decode(row)] == []
    assert ours.pad_id == 0 and all(row[-1] == 1 for row in map(ours.encode, texts[:9]))


def test_ids_equal_sentencepiece_on_plain_prompts(proto, tmp_path):
    t5_file(proto, tmp_path / "tokenizer.json", "one space")
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")
    truth = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    rng = random.Random(3)
    for _ in range(200):
        prompt = " ".join(rng.choices(WORDS, k=12))
        assert ours.encode(prompt) == [*truth.encode(prompt), 1]


def test_normalizer_on_every_character():
    """Every character of the basic plane but Han, Hangul and private use, where clusters begin and end."""
    charsmap = train(byte_fallback=False).normalizer_spec.precompiled_charsmap
    truth, ours = normalizers.Precompiled(charsmap), _CharsMap(charsmap)
    for char in map(chr, [*range(0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x10000)]):
        if unicodedata.ucd_3_2_0.category(char) != "Cn":  # a set that does not grow with the version of Python
            for template in ["½{}", "e\u0301{}", "{}½\u0301", "{}\u0344\u0301", "\r{}\n"]:
                text = template.format(char)
                assert ours(text) == truth.normalize_str(text), ascii(text)
    for text in ["e\u0301\U0001f3fd", "½\u0301\U000e007f"]:  # a skin tone, a tag: beyond the basic plane
        assert ours(text) == truth.normalize_str(text), ascii(text)


def spec(vocab: dict[str, float] | None = None, **changes) -> dict:
    """A whole tokenizer.json by hand: <pad>, </s>, <unk>, then `vocab`; `changes` replace top-level parts."""
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], *map(list, (vocab or {"▁": -1.0}).items())]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": pieces[index][0], **flags} for index in range(3)],
        "normalizer": None,
        "pre_tokenizer": METASPACE,
        "post_processor": {"type": "TemplateProcessing", "single": PLAIN, "special_tokens": {"</s>": {"ids": [1]}}},
        "decoder": METASPACE,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
    } | changes


@pytest.mark.parametrize(
    ("vocab", "text", "pieces"),
    [
        # -1 -2 -4 = -7 beats -1 -3 -5 = -9 and -1 -3 -3 -4 = -11
        ({"▁": -1, "a": -3, "b": -3, "c": -4, "ab": -2, "bc": -5}, "abc", ["▁", "ab", "c"]),
        # "▁ab" + "c" = -5 ties with "▁a" + "bc" = -5: the longer last piece wins
        ({"▁a": -2, "bc": -3, "▁ab": -1, "c": -4}, "abc", ["▁a", "bc"]),
        # an unknown "b" scores min - 10 = -22: "aa" + "b" at -13.5 beats "a" + "ab" at -14, at -14.5 it does not
        ({"▁": -1, "a": -2, "ab": -12, "aa": 8.5}, "aab", ["▁", "aa", "<unk>"]),
        ({"▁": -1, "a": -2, "ab": -12, "aa": 7.5}, "aab", ["▁", "a", "ab"]),
        # unknown neighbors share one id
        ({"▁": -1, "a": -4}, "a☃☃a ☃", ["▁", "a", "<unk>", "a", "▁", "<unk>"]),
        # added tokens are cut out first; the text between them gets a prefix unless it begins with a space
        ({"▁": -1, "a": -2}, "a <pad> a</s>a", ["▁", "a", "▁", "<pad>", "▁", "a", "</s>", "▁", "a"]),
        ({"▁": -1, "a": -2}, "", []),
    ],
)
def test_best_cut_by_hand(vocab, text, pieces):
    ours = Tokenizer(spec(vocab))
    names = ["<pad>", "</s>", "<unk>", *vocab]
    assert ours.encode(text) == [names.index(piece) for piece in [*pieces, "</s>"]]


def test_byte_fallback_needs_every_byte():
    pieces = {"▁": -1.0, **{f"<0x{byte:02X}>": -9.0 for byte in "é".encode()}}
    changed = spec(pieces)
    changed["model"]["byte_fallback"] = True
    ours = Tokenizer(changed)
    assert ours.encode("é") == [3, 4, 5, 1]
    assert ours.encode("é☃") == [3, 2, 1]  # one unknown run, of which two bytes are missing


def test_long_word_is_cut_whole():
    ours = Tokenizer(spec({"▁": -1.0, "abababab": -1.0, "a": -3.0, "b": -3.0}))
    assert ours.encode("ab" * 4000) == [3, *[4] * 1000, 1]


@pytest.mark.parametrize(
    ("old", "prefix"),
    [
        ({"add_prefix_space": True}, "▁"),
        ({"add_prefix_space": True, "str_rep": "▁"}, "▁"),
        ({"add_prefix_space": True, "prepend_scheme": "always"}, "▁"),
        ({"prepend_scheme": "never", "split": True}, ""),
        ({"add_prefix_space": False}, ""),
    ],
)
def test_metaspace_spellings(old, prefix):
    metaspace = {"type": "Metaspace", "replacement": "▁", **old}
    ours = Tokenizer(spec({"▁a": -1.0, "a": -2.0}, pre_tokenizer=metaspace, decoder=metaspace))
    assert ours.encode("a a") == [3 if prefix else 4, 3, 1]
    assert ours.decode([3, 3]) == ("a a" if prefix else " a a")


TOKEN = spec()["added_tokens"][0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer .*Lowercase"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}}, "normalizer .*NFKC"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}}, "normalizer .*Replace"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAE="}}, "buffer"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "base64"),
        ({"pre_tokenizer": None}, "pre_tokenizer None"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "pre_tokenizer .*ByteLevel"),
        ({"pre_tokenizer": METASPACE | {"prepend_scheme": "first"}}, "pre_tokenizer .*first"),
        ({"pre_tokenizer": METASPACE | {"split": False}}, "pre_tokenizer .*split"),
        ({"pre_tokenizer": METASPACE | {"replacement": "_"}}, "pre_tokenizer .*_"),
        ({"decoder": {"type": "ByteFallback"}}, "decoder .*ByteFallback"),
        ({"post_processor": None}, "post_processor None"),
        ({"post_processor": {"type": "TemplateProcessing", "single": PLAIN, "special_tokens": {}}}, "no '</s>'"),
        ({"added_tokens": [TOKEN | {"single_word": True}]}, "added token .*single_word"),
        ({"added_tokens": [TOKEN | {"normalized": True}]}, "added token .*normalized"),
        ({"added_tokens": [TOKEN | {"id": 1}]}, "added token .*id in the vocab"),
        ({"added_tokens": []}, "no '<pad>'"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "model .*BPE"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}}, "model .*unk_id"),
        ({"model": {"type": "Unigram", "unk_id": 1, "vocab": [["a", 0.0]]}}, "model .*unk_id"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a"]]}}, r"model.vocab\[0\] must be a list of 2 items"),
    ],
)
def test_what_a_t5_file_does_not_hold_is_refused_in_one_line(tmp_path, change, named):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec() | change))
    with pytest.raises(UserError, match=named) as error:
        Tokenizer.from_file(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 1}', "\ufeff{}", "\0\1"])
def test_broken_file_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="is not a UMT5 tokenizer.json|should hold a JSON object") as error:
        Tokenizer.from_file(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_unknown_id(tmp_path):
    with pytest.raises(MissingFile, match="tokenizer.json does not exist"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="id 99 has no piece"):
        Tokenizer(spec()).decode([3, 99])


def test_charsmap_by_hand():
    """A trie of one key, "A": the root's children are at 1 ^ byte, A's value at another ^ 2, that is the unit 0x42."""
    trie = [0] * 256
    trie[0] = 1 << 10
    trie[1 ^ 0x41] = 0x41 | 1 << 8 | 2 << 10  # the label, "a key ends here", where its children are
    trie[0x42] = 1 << 31 | 0x143  # a value; without bit 31 it would be a child of the root with label "C"
    replacements = b"-" * 0x142 + b"\0ab\0"
    blob = (1024).to_bytes(4, "little") + b"".join(unit.to_bytes(4, "little") for unit in trie) + replacements
    assert _CharsMap(blob)("BACA\u0301\0") == "BabCab\0"  # "A" and its accent are one cluster, replaced whole
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}
    assert Tokenizer(spec({"▁": -1.0, "a": -1.0, "b": -1.0}, normalizer=normalizer)).encode("A") == [3, 4, 5, 1]
