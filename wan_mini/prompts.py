"""Prompts: cleaning as Wan does, Wan's negative prompt, text vectors."""

import html
import re
import unicodedata

import torch
from torch import Tensor

from wan_mini.device.offload import resident
from wan_mini.load import Wan
from wan_mini.tokenizer import SPACES

# The original's default (wan/configs/shared_config.py), what a video should not look like: garish colors, static,
# overexposed, blurred, subtitles, painting, grayish, worst quality, ugly, extra fingers, badly drawn hands and faces,
# deformed, messy background, three legs, many people in the background, walking backwards, ...
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


def clean_prompt(text: str) -> str:
    """Clean a prompt as Wan does: `ftfy.fix_text`, `html.unescape` twice, every run of white space to one space, strip.

    Of ftfy's defaults it does, until nothing changes: entities (unless the text holds a "<"), Windows-1252 controls,
    Latin ligatures, character width, curly quotes, lone surrogates, terminal colors, control characters, NFC.
    So the full-width commas of Wan's negative prompt become ASCII. Lost: the repair of wrongly decoded text ("cafÃ©")
    and of upper-case entities ("&NTILDE;"), and that ftfy looks for the "<" line by line.

    Source: Wan 2.1, wan/modules/tokenizers.py; ftfy 6.3.
    """
    before, is_markup = None, "<" in text
    while text != before:
        before = text
        if not is_markup:
            text = re.sub("&#?[0-9A-Za-z]{1,24};", lambda match: html.unescape(match[0]), text)
        text = re.sub("[\x80-\x9f]", lambda match: html.unescape(f"&#{ord(match[0])};"), text)
        # NFKC for widths and ligatures only: on the rest it would change what is said ("10²" is not "102").
        folded = "[\u3000\uff01-\uffef\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb04\ufb06]"
        text = re.sub(folded, lambda match: unicodedata.normalize("NFKC", match[0]), text.replace("\ufb05", "\u017ft"))
        text = re.sub("[\u02bc\u2018-\u201b]", "'", re.sub("[\u201c-\u201f]", '"', text))
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = re.sub("\x1b\\[[0-9;]*[a-zA-Z]", "", text)
        text = re.sub("[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", "", text)
        text = unicodedata.normalize("NFC", text)
    return re.sub(f"[{SPACES}]+", " ", html.unescape(html.unescape(text))).strip()


@torch.no_grad()
def encode_prompts(wan: Wan, prompts: list[str], device: torch.device, *, blocks: bool = True) -> list[Tensor]:
    """Text vectors of each prompt, (1, L, text_dim), cut to the prompt's own length L <= text_len.

    A prompt that is too long loses its end, not its end-of-text token; the empty prompt is that token alone.
    blocks: see offload.resident.
    """
    limit, texts = wan.dit.config.text_len, []
    with resident(wan.text_encoder, device, blocks=blocks):
        for prompt in prompts:
            ids = wan.tokenizer.encode(clean_prompt(prompt))
            if len(ids) > limit:
                print(f"note: the prompt has {len(ids)} tokens, the model reads {limit}: its end is cut off")
                ids = [*ids[: limit - 1], ids[-1]]
            batch = torch.tensor([ids], device=device)  # (1, L)
            texts.append(wan.text_encoder(batch, torch.ones_like(batch)))
    return texts
