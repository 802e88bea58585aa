"""The errors that a user can fix, and checks that raise them. Any other exception is a bug and shows its traceback."""

import math
from collections.abc import Collection


class UserError(ValueError):
    """What was got, what was wanted, and how to fix it, in one line."""


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
        if not math.isfinite(number) or number < at_least:
            raise UserError(f"{name} must be at least {at_least:g} and finite, got {value}")
        if number > at_most:
            raise UserError(f"{name} must be at most {at_most:g}, got {value}")


def check_positive(name: str, value: float, at_most: float = math.inf) -> None:
    """Raises UserError unless the value is finite and in (0, at_most]."""
    check_range(name, value, 0, at_most)
    if value == 0:
        raise UserError(f"{name} must be above 0, got 0")
