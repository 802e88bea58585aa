"""The UMT5 tokenizer: prompt to ids, from the official `tokenizer.json`, with nothing but Python.

    prompt -> clean_prompt -> cut out added tokens -> normalize -> words -> pieces of each word -> add </s>

Every step is what the file says and gives the ids that the `tokenizers` package gives for the same file; a component
that files of the T5 family do not hold is refused by name. The file's own truncation and padding are ignored: cutting
to `text_len` and filling with `Tokenizer.pad_id` is the caller's business.
"""

import base64
import json
import re
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from itertools import groupby
from pathlib import Path

MARK = "▁"  # stands for a space
# Unicode's White_Space, the file format's idea of a space; `str.isspace` would add four control characters.
SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
UNKNOWN_PENALTY = 10.0  # an unknown character scores this much less than the worst piece (sentencepiece)


class Tokenizer:
    """Text to ids and back; `pad_id` is the id that fills a batch. Build it with `from_file`."""

    def __init__(self, spec: dict):
        match spec["model"]:
            case {"type": "Unigram", "unk_id": int(unk_id), "vocab": [_, *_] as vocab} if unk_id < len(vocab):
                self.unk_id, self.byte_fallback = unk_id, spec["model"].get("byte_fallback", False)
            case other:
                raise _unsupported("model", other, "Unigram with unk_id and vocab")
        self.scores = {piece: float(score) for piece, score in vocab}
        self.unknown_score = min(self.scores.values()) - UNKNOWN_PENALTY
        self.longest = max(map(len, self.scores))
        self.pieces = {index: piece for index, (piece, _) in enumerate(vocab)}
        self.ids = {piece: index for index, piece in self.pieces.items()}
        self.normalize = _normalizer(spec["normalizer"])
        self.cut_words = _word_cutter(spec["pre_tokenizer"])
        self.drops_mark = _has_prefix("decoder", spec["decoder"])
        self.suffix = _suffix(spec["post_processor"])
        self.added = {token["content"]: token for token in spec["added_tokens"]}
        for content, token in self.added.items():
            if token["single_word"] or token["normalized"] or token["id"] != self.ids.get(content, token["id"]):
                raise _unsupported("added token", token, "its id in the vocab, neither single_word nor normalized")
            self.pieces[token["id"]] = content
        self.added_pattern = re.compile("|".join(map(re.escape, sorted(self.added, key=len, reverse=True))))
        self.pad_id: int = self.added["<pad>"]["id"]

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`; FileNotFoundError if it is not there, ValueError naming what it holds amiss."""
        try:
            return cls(json.loads(Path(path).read_bytes()))
        except KeyError as error:
            raise ValueError(f"{path} is not a UMT5 tokenizer.json: it has no {error}") from None
        except (ValueError, TypeError, struct.error) as error:
            raise ValueError(f"{path} is not a UMT5 tokenizer.json: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, closed by </s>; neither cut nor padded."""
        ids, done = [], 0
        for match in self.added_pattern.finditer(text):
            token, (start, end) = self.added[match[0]], match.span()
            if token["lstrip"]:
                start = len(text[:start].rstrip(SPACES))
            if token["rstrip"]:
                end = len(text) - len(text[end:].lstrip(SPACES))
            ids += [*self._encode_plain(text[done:start]), token["id"]]
            done = end
        return [*ids, *self._encode_plain(text[done:]), *self.suffix]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without the special tokens; ValueError for an id that no piece has."""
        ids = list(ids)
        if unknown := [index for index in ids if index not in self.pieces]:
            raise ValueError(f"id {unknown[0]} has no piece, want ids of this tokenizer's {len(self.pieces)} pieces")
        special = {token["id"] for token in self.added.values() if token["special"]}
        pieces = [self.pieces[index] for index in ids if index not in special]
        if pieces and self.drops_mark:
            pieces[0] = pieces[0].replace(MARK, "")
        return "".join(pieces).replace(MARK, " ")

    def _encode_plain(self, text: str) -> Iterator[int]:
        """Yield the ids of a text that holds no added token."""
        unk = self.unk_id
        for word in self.cut_words(self.normalize(text)):
            for is_unknown, group in groupby(self._best_cut(word), lambda piece: self.ids.get(piece, unk) == unk):
                pieces = list(group)
                yield from self._encode_unknown("".join(pieces)) if is_unknown else map(self.ids.get, pieces)

    def _encode_unknown(self, chars: str) -> list[int]:
        """Return the ids of the bytes of unknown neighbors, if the file has them, else one id for them all."""
        ids = [self.ids.get(f"<0x{byte:02X}>") for byte in chars.encode()] if self.byte_fallback else [None]
        return [self.unk_id] if None in ids else ids

    def _best_cut(self, word: str) -> list[str]:
        """Cut `word` into pieces with the largest sum of scores (Viterbi); among equals the longest last piece wins."""
        best = [0.0] + [float("-inf")] * len(word)  # best[i]: the largest score of word[:i]
        cut = [0] * (len(word) + 1)  # cut[i]: where its last piece begins
        for start in range(len(word)):
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                score = self.scores.get(word[start:end], self.unknown_score if end == start + 1 else None)
                if score is not None and best[start] + score > best[end]:
                    best[end], cut[end] = best[start] + score, start
        pieces, end = [], len(word)
        while end:
            pieces.append(word[cut[end] : end])
            end = cut[end]
        return pieces[::-1]


def _unsupported(component: str, spec: object, wanted: str) -> ValueError:
    return ValueError(f"{component} {str(spec)[:100]} is not supported, want {wanted}")


def _normalizer(spec: dict | None) -> Callable[[str], str]:
    match spec:
        case None:
            return lambda text: text
        case {"type": "Sequence", "normalizers": [*specs]}:
            steps = [_normalizer(step) for step in specs]
            return lambda text: reduce(lambda done, step: step(done), steps, text)
        case {"type": "Precompiled", "precompiled_charsmap": str(charsmap)}:
            return _CharsMap(base64.b64decode(charsmap, validate=True))
        case {"type": "Strip", "strip_left": bool(left), "strip_right": bool(right)}:
            return lambda text: text.lstrip(SPACES * left).rstrip(SPACES * right)
        case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": str(content)}:
            return lambda text: content.join(re.split(" {2,}", text))
    raise _unsupported("normalizer", spec, "null, Precompiled, Strip, Replace of ' {2,}', or a Sequence of these")


def _word_cutter(spec: dict | None) -> Callable[[str], Iterator[str]]:
    """Return what cuts a text into words, each with the mark of the space before it."""
    spaced = "(?s:.+)"  # one "word": only the marks cut
    match spec:
        case {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, last]}:
            spaced, spec = f"[^{SPACES}]+", last
    prefix = MARK * _has_prefix("pre_tokenizer", spec)

    def cut(text: str) -> Iterator[str]:
        for word in re.findall(spaced, text):
            word = word.replace(" ", MARK)
            yield from re.findall(f"{MARK}[^{MARK}]*|[^{MARK}]+", word if word[0] == MARK else prefix + word)

    return cut


def _has_prefix(component: str, spec: dict | None) -> bool:
    """Return whether a Metaspace puts a mark before every text, in the new or the old spelling."""
    match spec:
        case {"type": "Metaspace", "replacement": "▁"} if spec.get("split", True):
            scheme = spec.get("prepend_scheme", "always" if spec.get("add_prefix_space", True) else "never")
            if scheme in ("always", "never"):
                return scheme == "always"
    raise _unsupported(component, spec, 'Metaspace of "▁", prepended always or never, split')


def _suffix(spec: dict | None) -> list[int]:
    match spec:
        case {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}, *after], "special_tokens": tokens}:
            return [index for item in after for index in tokens[item["SpecialToken"]["id"]]["ids"]]
    raise _unsupported("post_processor", spec, "TemplateProcessing of the text and </s>")


class _CharsMap:
    """SentencePiece's compiled normalizer: replaces characters and short clusters of them.

    The blob is the byte size of a trie (uint32, little-endian), the trie (a double array of uint32 over UTF-8 bytes,
    whose values are offsets) and the replacements at these offsets, each closed by a zero byte. As in `tokenizers`, a
    grapheme cluster under 6 bytes becomes, whole, the replacement of its shortest prefix in the trie: "½́" is "1⁄2".
    """

    def __init__(self, blob: bytes):
        (size,) = struct.unpack_from("<I", blob)
        self.trie = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self.replacements = blob[4 + size :]

    def __call__(self, text: str) -> str:
        return "".join(map(self._replace, _graphemes(text)))

    def _replace(self, cluster: str) -> str:
        key = cluster.encode()
        if len(key) < 6 and (whole := self._find(key)) is not None:
            return whole
        return cluster if len(cluster) == 1 else "".join(map(self._replace, cluster))

    def _find(self, key: bytes) -> str | None:
        """Return the replacement of the shortest prefix of `key` that the trie holds, None if it holds none."""
        node = _child(self.trie[0])
        for byte in key:
            node ^= byte
            unit = self.trie[node]
            if unit & 0x800000FF != byte:  # its low byte is the label; bit 31 marks a value
                return None
            node ^= _child(unit)
            if unit >> 8 & 1:  # a key ends here, its value is the child
                start = self.trie[node] & 0x7FFFFFFF
                return self.replacements[start : self.replacements.index(0, start)].decode()
        return None


def _child(unit: int) -> int:
    return unit >> 10 << (unit >> 9 & 1) * 8


def _graphemes(text: str) -> Iterator[str]:
    """Cut a text into grapheme clusters (Unicode annex 29), as far as it matters.

    Hangul, flags, joined emoji and Indic conjuncts stay in parts. Whole they have 6 bytes or more, so it shows only
    where an accent of two bytes follows a part that the map itself holds.
    """
    kinds = "".join(map(_grapheme_kind, text))
    for match in re.finditer("\r\n|[\r\nC]|P*O?E*", kinds):
        yield text[match.start() : match.end()]


def _grapheme_kind(char: str) -> str:
    """Return P if a character joins the next, E if it joins the last, C for a control, itself for CR and LF, else O."""
    for kind, members in (
        ("P", "[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e]"),
        ("E", "[\u200c\u200d\u0e33\u0eb3\uff9e\uff9f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]"),
        # The spacing marks of Myanmar and Tai Tham that join nothing.
        ("O", "[\u102b\u102c\u1038\u1062-\u1064\u1067-\u106d\u1083\u1087-\u108c\u108f\u109a-\u109c]"),
        ("O", "[\u1a61\u1a63\u1a64\uaa7b\uaa7d]"),
    ):
        if re.match(members, char):
            return kind
    category = unicodedata.category(char)
    if category[0] == "M":
        return "E"
    return char if char in "\r\n" else "C" if category in ("Cc", "Cf", "Zl", "Zp") else "O"
