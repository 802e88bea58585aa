"""The command line of every program: arguments, options by name, errors in one line."""

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import torch

from wan_mini.errors import UserError

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def add_common_flags(parser: argparse.ArgumentParser, version: str) -> None:
    """Add --version and --traceback."""
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def field_names(config: Any) -> list[str]:
    """Names of a dataclass's fields, in their order."""
    return [field.name for field in fields(config)]


def with_options(config: Config, options: Mapping[str, Any], source: str) -> Config:
    """A copy of a dataclass with values from the command line or from JSON; texts and lists take the fields' types.

    Raises UserError, which begins with the source, on a name that is no field or a value of another type.
    """
    hints = get_type_hints(type(config))
    values = {}
    for name, value in options.items():
        if name not in hints:
            raise UserError(f"{source} needs one of {', '.join(hints)}, got {name}")
        try:
            values[name] = _convert(value, hints[name])
        except (ValueError, TypeError):
            example = getattr(config, name)
            raise UserError(f"{source} {name} needs a value like {example}, got {value}") from None
    return replace(config, **values)  # type: ignore[type-var]


def _convert(value: Any, hint: Any) -> Any:
    """One value as its type: "3,4" or [3, 4] for a tuple, "none" or None where None is allowed."""
    kinds = get_args(hint)
    if NoneType in kinds:
        if value in (None, "none", "None"):
            return None
        (hint,) = (kind for kind in kinds if kind is not NoneType)
    if getattr(hint, "__origin__", None) is tuple:
        return _convert_tuple(value, get_args(hint))
    if hint is int and isinstance(value, float):
        raise ValueError(value)
    if hint is bool:  # bool("False") is True
        return ("False", "True").index(str(value).capitalize()) == 1
    if hint is str and not isinstance(value, str):
        raise TypeError(value)
    return hint(value)


def _convert_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if kinds[-1] is Ellipsis:  # any number; "" is none
        parts = [part for part in parts if part != ""]
        kinds = kinds[:1] * len(parts)
    return tuple(_convert(part, kind) for part, kind in zip(parts, kinds, strict=True))


def parse_pairs(texts: list[str], flag: str = "--set") -> dict[str, str]:
    """["tau=3", "tile=2,5"] -> {"tau": "3", "tile": "2,5"}. Raises UserError on anything else."""
    pairs = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not name or not separator:
            raise UserError(f"{flag} needs NAME=VALUE, got {text}")
        pairs[name] = value
    return pairs


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Call a program's main. Returns the exit code: 0, or 2 with one line on stderr for what its user can mend."""
    show_traceback = "--traceback" in (sys.argv[1:] if argv is None else argv)
    try:
        main(argv)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (UserError, OSError, FloatingPointError, RuntimeError) as error:
        message = _one_line(error)
        if message is None:
            raise  # a bug: show its traceback
        if show_traceback:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str | None:
    """What to tell the user, or None if the error is a bug."""
    text = " ".join(str(error).split("\n"))
    if not isinstance(error, RuntimeError):
        return text
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory, try --offload or a smaller clip ({text.split('. ')[0]})"
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if "BackendCompilerFailed" in kinds:  # torch._dynamo's class, which is imported only when something is compiled
        return f"cannot compile here, run without --compile ({' '.join(str(error).splitlines()[:2])})"
    return None
