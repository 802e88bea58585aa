"""The errors that a user can fix, and checks that raise them. Any other exception is a bug and shows its traceback."""

import math
import re
from collections.abc import Collection

import torch
from torch import Tensor

# What a terminal obeys instead of showing it (C0, DEL, C1), breaks a line at, or writes backwards; and lone surrogates,
# which stand for bytes of a name that are no UTF-8.
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """A text with its control characters, but for those to keep, as escapes that a terminal shows and does not obey."""

    def escape(match: re.Match[str]) -> str:
        if match[0] in keep:
            return match[0]
        return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")

    return CONTROLS.sub(escape, text)


class UserError(ValueError):
    """What was got, what was expected, and how to fix it, in one line that any terminal may print."""

    def __init__(self, message: str):
        super().__init__(printable(message.replace("\n", " ")))


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that should be there."""


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises UserError unless the value is one of the choices."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value}")


def check_range(name: str, value: float | tuple[float, ...], at_least: float = 0, at_most: float = math.inf) -> None:
    """Raises UserError unless the value, or each number of a tuple, is finite and in [at_least, at_most]."""
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if not number >= at_least or number == math.inf:  # NaN is not at least anything
            raise UserError(f"{name} must be at least {at_least:g} and finite, got {value}")
        if number > at_most:
            raise UserError(f"{name} must be at most {at_most:g}, got {value}")


def check_positive(name: str, value: float, at_most: float = math.inf) -> None:
    """Raises UserError unless the value is finite and in (0, at_most]."""
    check_range(name, value, 0, at_most)
    if value == 0:
        raise UserError(f"{name} must be above 0, got 0")


def check_finite(latents: Tensor, step: int, steps: int) -> None:
    """Raises FloatingPointError that names the step if latents hold NaN or infinity."""
    if not torch.isfinite(latents).all():
        hint = "try --dtype float32, a lower learning rate, or check the checkpoint with python -m wan_mini.inspect"
        raise FloatingPointError(f"latents are not finite after step {step + 1} of {steps}: {hint}")
