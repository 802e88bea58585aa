"""Words of a prompt that the model cannot read: it takes any text, and says nothing of what it does not know."""

import re

from wan_mini.tokenizer import MARK, Tokenizer

NAMED = 5  # words in a note
LENGTH = 20  # characters of a word in a note


def unknown_words(tokenizer: Tokenizer, prompt: str) -> list[str]:
    """Words with a character that the tokenizer lacks, and words of Latin letters that it spells letter by letter."""
    words = []
    for word in prompt.split():
        ids = tokenizer.encode(word)
        pieces = [tokenizer.pieces[number].strip(MARK) for number in ids if number not in tokenizer.special_ids]
        longest = max(map(len, pieces), default=0)
        spelled = longest == 1 and len(re.findall("[A-Za-z]", word)) > 2
        if spelled or tokenizer.unk_id in ids:
            words.append(word)
    return words


def note_unknown_words(tokenizer: Tokenizer, prompt: str) -> None:
    """Print a note that names the first unknown words, if there are any."""
    words = unknown_words(tokenizer, prompt)
    if not words:
        return
    named = ", ".join(word[:LENGTH] for word in words[:NAMED])
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    print(f"note: the model has no token for {named}{more}: it may not know what is meant")
