"""The command line of every program: arguments, options, errors in one line."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (see --help)\n")


def height_width(text: str) -> tuple[int, int]:
    """Parse "480x832", height first, for argparse."""
    try:
        height, width = (int(number) for number in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"size must be HEIGHTxWIDTH such as 480x832, got {text}") from None
    return height, width


def parse_options(base: Any, texts: list[str], flag: str = "--set") -> dict[str, Any]:
    """Parse NAME=VALUE for fields of a dataclass, each with the type of its value in `base`; tuples as 3,4.

    Raises ValueError, which names the flag, on an unknown name or a value of another type.
    """
    knobs = {}
    names = [f.name for f in fields(base)]
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names or not value:
            raise ValueError(f"{flag} needs NAME=VALUE with one of {', '.join(names)}, got {text}")
        default = getattr(base, name)
        try:
            if isinstance(default, tuple):
                knobs[name] = tuple(type(n)(part) for n, part in zip(default, value.split(","), strict=True))
            else:
                knobs[name] = int(value) if default is None else type(default)(value)
        except ValueError:
            raise ValueError(f"{flag} {name} needs a value like {default}, got {value}") from None
    return knobs


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Call a program's main: exit code 0, or 2 with one line on stderr for what its user can mend."""
    try:
        main(argv)
    except (ValueError, OSError, FloatingPointError) as problem:
        print("error:", " ".join(str(problem).split("\n")), file=sys.stderr)
        return 2
    except RuntimeError as problem:
        if "BackendCompilerFailed" in {kind.__name__ for kind in type(problem).__mro__}:
            why = " ".join(str(problem).splitlines()[:2])
            print(f"error: cannot compile here, run without --compile ({why})", file=sys.stderr)
            return 2
        if not isinstance(problem, torch.OutOfMemoryError) and "can't allocate memory" not in str(problem):
            raise  # a bug, whose traceback is wanted
        print(f"error: out of memory, try --offload or a smaller clip ({str(problem).split('. ')[0]})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
