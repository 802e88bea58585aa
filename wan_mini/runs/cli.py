"""The command line of every program: arguments, options by name, errors in one line."""

import argparse
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TextIO, TypeVar, cast, get_args, get_type_hints

import torch

from wan_mini.errors import CONTROLS, UserError, printable
from wan_mini.noise import SEEDS

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, and takes no empty text for a path, which would be any folder."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {printable(message)} (see --help)\n")


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("needs a path, got an empty text")
    return Path(text)


def new_path(text: str) -> Path:
    """A path to be written to, as an argument's type: without control characters."""
    if re.search(CONTROLS, text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")):
        raise argparse.ArgumentTypeError(f"needs a path without control characters, got {text}")
    return _path(text)


def seed_number(text: str) -> int:
    """The seed of a random generator, as an argument's type."""
    if not re.fullmatch(r"[-+]?\d{1,20}", text) or not SEEDS[0] <= int(text) <= SEEDS[1]:
        raise argparse.ArgumentTypeError(f"needs a seed from -2^63 to 2^64 - 1, got {text}")
    return int(text)


class PlainOutput:
    """A stream whose control characters, and those that its encoding lacks, are shown as escapes.

    Where nobody reads any more (`| head -1`), or the disk is full, text is dropped: that is no reason to lose a run.
    """

    def __init__(self, stream: TextIO, keep: str):
        self.stream = stream
        self.keep = keep

    def write(self, text: str) -> int:
        """Write what a terminal shows and does not obey."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        plain = printable(text, self.keep).encode(encoding, "backslashreplace")
        with self._lost_if_broken():
            self.stream.write(plain.decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Pass on what is kept back."""
        with self._lost_if_broken():
            self.stream.flush()

    @contextmanager
    def _lost_if_broken(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with suppress(OSError, ValueError):  # what is kept back must not fail again when the process ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def plain_output() -> Iterator[None]:
    """Names of files, texts of models and prompts are printed everywhere: here they become plain for all."""
    with ExitStack() as stack:
        for redirect, stream, keep in (
            (redirect_stdout, sys.stdout, "\n\t"),
            (redirect_stderr, sys.stderr, "\n\t\r"),
        ):
            output = PlainOutput(io.StringIO() if stream is None else stream, keep)  # None: it was closed (>&-)
            stack.enter_context(redirect(cast(TextIO, output)))
            stack.callback(output.flush)
        yield


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
        except (ValueError, TypeError, OverflowError):
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
        if name in pairs:
            raise UserError(f"{name} given twice by {flag}: keep one")
        pairs[name] = value
    return pairs


@plain_output()
def run(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Call a program's main. Returns the exit code: main's or 0; 2 with one line on stderr for what a user can fix."""
    show_traceback = "--traceback" in (sys.argv[1:] if argv is None else argv)
    try:
        with signals_stop():
            return main(argv) or 0
    except KeyboardInterrupt as stop:
        sys.stdout.flush()  # in a file that takes both, what was said first comes first
        print("; ".join(["stopped", *_advice(stop)]), file=sys.stderr)
        return 130
    except (UserError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        message = _one_line(error)
        if message is None:
            raise  # a bug: show its traceback
        sys.stdout.flush()
        if show_traceback:
            traceback.print_exc()
        print("; ".join([f"error: {message}", *_advice(error)]), file=sys.stderr)
        return 2


@contextmanager
def signals_stop() -> Iterator[None]:
    """SIGTERM and SIGHUP end a program as Ctrl-C does, which cleans up; a signal that is ignored (nohup) stays so.

    SIGINT is among them where end_quietly had it wait for this.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def advise(error: BaseException, advice: str) -> None:
    """Let the line about an error, or about a stop, end with what to do next."""
    vars(error).setdefault("__notes__", []).append(advice)  # as add_note does, from Python 3.11 on


def _advice(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def refuse_flags(
    parser: argparse.ArgumentParser, argv: list[str] | None, mode: str, allowed: Collection[str]
) -> set[str]:
    """The names of the flags that a command line gives, also at their defaults.

    Raises UserError on one that a mode such as --decode ignores.
    """
    names = vars(parser.parse_args(argv))
    values = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names))))
    given = {name for name, value in values.items() if value is not None}
    refused = sorted(f"--{name.replace('_', '-')}" for name in given - {*allowed, "traceback"})
    if refused:
        raise UserError(f"{mode} does not use {', '.join(refused)}: leave it out, the run's own settings hold")
    return given


def _one_line(error: Exception) -> str | None:
    """What to tell the user, or None if the error is a bug."""
    text = " ".join(str(error).split("\n"))
    no_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
    if no_memory or "could not create a primitive" in text:  # oneDNN's words for it
        return f"out of memory, try --offload or a smaller clip ({text.split('. ')[0]})"
    if not isinstance(error, RuntimeError):
        return text
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if "BackendCompilerFailed" in kinds:  # torch._dynamo's class, which is imported only when something is compiled
        return f"cannot compile here, run without --compile ({' '.join(str(error).splitlines()[:2])})"
    return None
