"""Prompts: cleaned as Wan does, Wan's negative prompt, and their encoding into text vectors."""

import html
import re
import unicodedata

import torch
from torch import Tensor

from wan_mini.device.offload import on_device
from wan_mini.errors import UserError
from wan_mini.load import Wan
from wan_mini.tokenizer import SPACES
from wan_mini.unknown_words import note_unknown_words

# The original's default (wan/configs/shared_config.py), what a video should not look like: garish colors, static,
# overexposed, blurred, subtitles, painting, grayish, worst quality, ugly, extra fingers, badly drawn hands and faces,
# deformed, messy background, three legs, many people in the background, walking backwards, ...
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
MAX_CHARACTERS = 100_000
# Widths and ligatures: on other characters NFKC would change the meaning ("10²" is not "102").
FOLDED = "[\u3000\uff01-\uffef\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb04\ufb06]"


def clean_prompt(text: str) -> str:
    """Clean a prompt as Wan does: `ftfy.fix_text`, `html.unescape` twice, every run of white space to one space, strip.

    Of ftfy's defaults it does, until nothing changes: entities (unless the text holds a "<"), Windows-1252 controls,
    Latin ligatures, character width, curly quotes, lone surrogates, terminal colors, control characters, NFC.
    So the full-width commas of Wan's negative prompt become ASCII. Lost: the repair of wrongly decoded text ("cafÃ©")
    and of upper-case entities ("&NTILDE;"), and that ftfy looks for the "<" line by line.

    Raises UserError on a text that is far longer than a model reads.
    Source: Wan 2.1, wan/modules/tokenizers.py; ftfy 6.3.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"a prompt may have {MAX_CHARACTERS} characters, got {len(text)}: the model reads 512 tokens")
    is_markup = "<" in text
    before = None
    while text != before:
        before = text
        if not is_markup:
            text = re.sub("&(amp;)+", "&amp;", text)  # as one by one, which would take a pass for each
            text = re.sub("&#?[0-9A-Za-z]{1,24};", _unescape, text)
        text = re.sub("[\x80-\x9f]", _read_as_windows_1252, text)
        text = text.replace("\ufb05", "\u017ft")  # NFKC would make "st" of the ligature of long s and t
        text = re.sub(FOLDED, _fold, text)
        text = re.sub("[\u201c-\u201f]", '"', text)
        text = re.sub("[\u02bc\u2018-\u201b]", "'", text)
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # lone surrogates
        text = re.sub("\x1b\\[[0-9;]*[a-zA-Z]", "", text)  # terminal colors
        text = re.sub("[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", "", text)  # control characters
        text = unicodedata.normalize("NFC", text)
    text = html.unescape(html.unescape(text))
    return re.sub(f"[{SPACES}]+", " ", text).strip()


def _unescape(entity: re.Match[str]) -> str:
    return html.unescape(entity[0])


def _read_as_windows_1252(control: re.Match[str]) -> str:
    return html.unescape(f"&#{ord(control[0])};")  # HTML reads these numbers so


def _fold(char: re.Match[str]) -> str:
    return unicodedata.normalize("NFKC", char[0])


@torch.no_grad()
def encode_prompts(wan: Wan, prompts: list[str], device: torch.device, *, offload_blocks: bool = False) -> list[Tensor]:
    """Text vectors of each prompt, (1, L, text_dim), truncated to the prompt's own length L <= text_len.

    A prompt that is too long loses its end, not its end-of-text token; the empty prompt is that token alone.
    offload_blocks: keep the text encoder's blocks in the host's memory, and copy each to the device for its turn.
    """
    limit = wan.dit.config.text_len
    tokens = []
    for prompt in prompts:
        cleaned = clean_prompt(prompt)
        note_unknown_words(wan.tokenizer, cleaned)
        tokens.append(_truncate(wan.tokenizer.encode(cleaned), limit))
    vectors = []
    with on_device(wan.text_encoder, device, offload_blocks=offload_blocks):
        for ids in tokens:
            batch = torch.tensor([ids], device=device)  # (1, L)
            mask = torch.ones_like(batch)
            vectors.append(wan.text_encoder(batch, mask))  # (1, L) -> (1, L, text_dim)
    return vectors


def _truncate(ids: list[int], limit: int) -> list[int]:
    """At most `limit` ids, the last of them kept; prints a note if there are more."""
    if len(ids) <= limit:
        return ids
    print(f"note: the prompt has {len(ids)} tokens, the model reads {limit}: its end is cut off")
    return [*ids[: limit - 1], ids[-1]]
