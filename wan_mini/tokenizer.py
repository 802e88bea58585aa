"""The UMT5 tokenizer: prompt to ids, from the official `tokenizer.json`, with nothing but Python.

    prompt -> clean_prompt -> split at added tokens -> normalize -> words -> pieces of each word -> add </s>

Every step gives the ids that the `tokenizers` package gives for the same file; a component that files of the T5 family
do not hold is refused by name. The file's truncation and padding are the caller's.
"""

import base64
import re
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from wan_mini.errors import UserError
from wan_mini.json_file import read_json
from wan_mini.weight_file import ADDED_TOKENS, VOCAB

Normalizer = Callable[[str], str]

MARK = "▁"  # stands for a space
# Unicode's White_Space, which is what the file format calls a space; `str.isspace` would add four control characters.
SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
UNKNOWN_PENALTY = 10.0  # an unknown character scores this much less than the worst piece (sentencepiece)


class Tokenizer:
    """Text to ids and back; `pad_id` is the id that fills a batch. Build it with `from_file`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """spec: the contents of a tokenizer.json. Raises ValueError if it is not supported, KeyError if it is short."""
        match spec["model"]:
            case {"type": "Unigram", "unk_id": int(unk_id), "vocab": [_, *_] as vocab} if 0 <= unk_id < len(vocab):
                self.unk_id = unk_id
            case other:
                raise _unsupported("model", other, "Unigram with unk_id and vocab")
        self.byte_fallback: bool = spec["model"].get("byte_fallback", False)
        VOCAB(vocab, "model.vocab")
        self.scores = {piece: float(score) for piece, score in vocab}
        self.unknown_score = min(self.scores.values()) - UNKNOWN_PENALTY
        self.longest = max(map(len, self.scores))
        self.pieces = {index: piece for index, (piece, _) in enumerate(vocab)}
        self.ids = {piece: index for index, piece in self.pieces.items()}
        self.normalize = _normalizer(spec["normalizer"])
        self.split_words = _word_splitter(spec["pre_tokenizer"])
        self.drops_mark = _has_prefix("decoder", spec["decoder"])
        self.suffix = _suffix(spec["post_processor"])
        self.added: dict[str, dict[str, Any]] = {}
        self.special_ids: set[int] = set()
        ADDED_TOKENS(spec["added_tokens"], "added_tokens")
        for token in spec["added_tokens"]:
            self._add_token(token)
        longest_first = sorted(self.added, key=len, reverse=True)
        self.added_pattern = re.compile("|".join(map(re.escape, longest_first)))
        self.pad_id: int = self.added["<pad>"]["id"]

    def _add_token(self, token: dict[str, Any]) -> None:
        """Register a token that is found in the raw text, before anything else. Raises ValueError as __init__."""
        content = token["content"]
        moved = token["id"] != self.ids.get(content, token["id"])
        if moved or token["single_word"] or token["normalized"]:
            raise _unsupported("added token", token, "its id in the vocab, neither single_word nor normalized")
        self.added[content] = token
        self.pieces[token["id"]] = content
        if token["special"]:
            self.special_ids.add(token["id"])

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises MissingFile if it is not there, UserError that names what is unsupported."""
        spec = read_json(Path(path), max_bytes=2**26)
        try:
            return cls(spec)
        except (LookupError, ValueError, TypeError, AttributeError, struct.error) as problem:
            reason = f"it has no {problem}" if isinstance(problem, KeyError) else str(problem)
            raise UserError(f"{path} is not a UMT5 tokenizer.json: {reason}") from None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, closed by </s>; neither truncated nor padded."""
        ids: list[int] = []
        done = 0  # characters of the text that are encoded
        for match in self.added_pattern.finditer(text):
            token = self.added[match[0]]
            start, end = match.span()
            if token["lstrip"]:
                start = len(text[:start].rstrip(SPACES))
            if token["rstrip"]:
                end = len(text) - len(text[end:].lstrip(SPACES))
            ids.extend(self._encode_plain(text[done:start]))
            ids.append(token["id"])
            done = end
        ids.extend(self._encode_plain(text[done:]))
        return ids + self.suffix

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without the special tokens. Raises ValueError on an id that no piece has."""
        pieces = []
        for index in ids:
            if index not in self.pieces:
                raise ValueError(f"id {index} has no piece, expected ids of this tokenizer's {len(self.pieces)} pieces")
            if index not in self.special_ids:
                pieces.append(self.pieces[index])
        if pieces and self.drops_mark:
            pieces[0] = pieces[0].replace(MARK, "")
        return "".join(pieces).replace(MARK, " ")

    def _encode_plain(self, text: str) -> Iterator[int]:
        """Yield the ids of a text that holds no added token; unknown neighbors are encoded together."""
        for word in self.split_words(self.normalize(text)):
            unknown = ""
            for piece in self._best_cut(word):
                if self.ids.get(piece, self.unk_id) == self.unk_id:
                    unknown += piece
                    continue
                yield from self._encode_unknown(unknown)
                yield self.ids[piece]
                unknown = ""
            yield from self._encode_unknown(unknown)

    def _encode_unknown(self, chars: str) -> list[int]:
        """The ids of the characters' bytes if the file has them all, else one id for them all."""
        if not chars:
            return []
        ids = []
        for byte in chars.encode():
            piece = f"<0x{byte:02X}>"
            if not self.byte_fallback or piece not in self.ids:
                return [self.unk_id]
            ids.append(self.ids[piece])
        return ids

    def _best_cut(self, word: str) -> list[str]:
        """Cut `word` into pieces with the largest sum of scores (Viterbi); among equals the longest last piece wins."""
        best = [0.0] + [float("-inf")] * len(word)  # best[i]: the largest score of word[:i]
        cut = [0] * (len(word) + 1)  # cut[i]: where its last piece begins
        for start in range(len(word)):
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                score = self.scores.get(word[start:end])
                if score is None and end == start + 1:
                    score = self.unknown_score
                if score is not None and best[start] + score > best[end]:
                    best[end] = best[start] + score
                    cut[end] = start
        pieces = []
        end = len(word)
        while end:
            pieces.append(word[cut[end] : end])
            end = cut[end]
        return pieces[::-1]


def _unsupported(component: str, spec: object, expected: str) -> ValueError:
    return ValueError(f"{component} {str(spec)[:100]} is not supported, expected {expected}")


def _normalizer(spec: dict[str, Any] | None) -> Normalizer:
    """What a file's normalizer does to a text. Raises ValueError if it is not supported."""
    match spec:
        case None:
            return str
        case {"type": "Sequence", "normalizers": [*specs]}:
            return _sequence([_normalizer(step) for step in specs])
        case {"type": "Precompiled", "precompiled_charsmap": str(charsmap)}:
            return _CharsMap(base64.b64decode(charsmap, validate=True))
        case {"type": "Strip", "strip_left": bool(left), "strip_right": bool(right)}:
            return lambda text: text.lstrip(SPACES * left).rstrip(SPACES * right)
        case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": str(content)}:
            return lambda text: content.join(re.split(" {2,}", text))
    raise _unsupported("normalizer", spec, "null, Precompiled, Strip, Replace of ' {2,}', or a Sequence of these")


def _sequence(steps: list[Normalizer]) -> Normalizer:
    return lambda text: reduce(lambda done, step: step(done), steps, text)


def _word_splitter(spec: dict[str, Any] | None) -> Callable[[str], Iterator[str]]:
    """What splits a text into words, each with the mark of the space before it. Raises ValueError as _has_prefix."""
    chunks = "(?s:.+)"  # the whole text: only the marks split it
    match spec:
        case {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, last]}:
            chunks = f"[^{SPACES}]+"
            spec = last
    prefix = MARK * _has_prefix("pre_tokenizer", spec)

    def split(text: str) -> Iterator[str]:
        for chunk in re.findall(chunks, text):
            marked = chunk.replace(" ", MARK)
            if not marked.startswith(MARK):
                marked = prefix + marked
            yield from re.findall(f"{MARK}[^{MARK}]*|[^{MARK}]+", marked)

    return split


def _has_prefix(component: str, spec: Any) -> bool:
    """Whether a Metaspace puts a mark before every text, in its new or old spelling. Raises ValueError if neither."""
    match spec:
        case {"type": "Metaspace", "replacement": "▁"} if spec.get("split", True):
            old_spelling = "always" if spec.get("add_prefix_space", True) else "never"
            scheme = spec.get("prepend_scheme", old_spelling)
            if scheme in ("always", "never"):
                return bool(scheme == "always")
    raise _unsupported(component, spec, 'Metaspace of "▁", prepended always or never, split')


def _suffix(spec: dict[str, Any] | None) -> list[int]:
    """The ids that close every text. Raises ValueError if the post-processor adds anything before it."""
    match spec:
        case {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}, *after], "special_tokens": tokens}:
            ids: list[int] = []
            for item in after:
                ids.extend(tokens[item["SpecialToken"]["id"]]["ids"])
            return ids
    raise _unsupported("post_processor", spec, "TemplateProcessing of the text and </s>")


class _CharsMap:
    """SentencePiece's compiled normalizer: replaces characters and short clusters of them.

    The blob is the byte size of a trie (uint32, little-endian), the trie (a double array of uint32 over UTF-8 bytes,
    whose values are offsets) and the replacements at these offsets, each closed by a zero byte. As in `tokenizers`, a
    grapheme cluster under 6 bytes becomes, whole, the replacement of its shortest prefix in the trie: "½́" is "1⁄2".
    """

    def __init__(self, blob: bytes) -> None:
        (size,) = struct.unpack_from("<I", blob)
        self.trie = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self.replacements = blob[4 + size :]

    def __call__(self, text: str) -> str:
        try:
            return "".join(map(self._replace, _graphemes(text)))
        except (IndexError, ValueError):
            raise UserError("tokenizer.json: an offset in precompiled_charsmap leads out of it: get it anew") from None

    def _replace(self, cluster: str) -> str:
        key = cluster.encode()
        if len(key) < 6:
            replacement = self._find(key)
            if replacement is not None:
                return replacement
        if len(cluster) == 1:
            return cluster
        return "".join(map(self._replace, cluster))

    def _find(self, key: bytes) -> str | None:
        """The replacement of the shortest prefix of `key` that the trie holds, None if it holds none."""
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
    """Offset from a node of the trie to its children: 22 bits, and one that shifts them."""
    return unit >> 10 << (unit >> 9 & 1) * 8


def _graphemes(text: str) -> Iterator[str]:
    """Split a text into grapheme clusters (Unicode annex 29), as far as it matters.

    Hangul, flags, joined emoji and Indic conjuncts stay in parts: whole they have 6 bytes or more. It shows only where
    an accent of two bytes follows a part that the map itself holds.
    """
    kinds = "".join(map(_grapheme_kind, text))
    for match in re.finditer("\r\n|[\r\nC]|P*O?E*", kinds):
        yield text[match.start() : match.end()]


def _grapheme_kind(char: str) -> str:
    """P if a character joins the next, E if it joins the last, C for a control, itself for CR and LF, else O."""
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
    if char in "\r\n":
        return char
    if category in ("Cc", "Cf", "Zl", "Zp"):
        return "C"
    return "O"
