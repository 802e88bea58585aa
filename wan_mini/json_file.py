"""JSON from outside: read in one place, bounded in size and depth, and checked against a schema before it is used.

A schema is a Check: a function of a value and of where it stands ("config.json: vae.std[3]"), which raises UserError
that names the file, the field, what was got and what was expected. The functions below make them.
"""

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from wan_mini.errors import MissingFile, UserError

Check = Callable[[Any, str], None]

MAX_BYTES = 2**24  # of a file
MAX_DEPTH = 32


def _wrong(where: str, expected: str, value: Any) -> NoReturn:
    got = str(value) if isinstance(value, (int, float)) else json.dumps(value)
    if len(got) > 60:
        got = got[:57] + "..."
    raise UserError(f"{where} must be {expected}, got {got}")


def integer(low: int, high: int) -> Check:
    """A whole number from low to high."""

    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            _wrong(where, f"a whole number from {low} to {high}", value)

    return check


def number(low: float = -sys.float_info.max, high: float = sys.float_info.max) -> Check:
    """A finite number from low to high."""

    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            _wrong(where, f"a finite number from {low:g} to {high:g}", value)

    return check


def text(longest: int = 10_000, shortest: int = 0) -> Check:
    """A text of so many characters."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or not shortest <= len(value) <= longest:
            _wrong(where, f"a text of {shortest} to {longest} characters", value)

    return check


def choice(*names: str) -> Check:
    """One of these texts."""

    def check(value: Any, where: str) -> None:
        if value not in names:
            _wrong(where, f"one of {', '.join(names)}", value)

    return check


def boolean(value: Any, where: str) -> None:
    """true or false."""
    if not isinstance(value, bool):
        _wrong(where, "true or false", value)


def anything(value: Any, where: str) -> None:
    """Whatever it is: its reader looks at it more closely."""


def file_name(value: Any, where: str) -> None:
    """A name of a file in the same folder: no path, so that it leads nowhere else."""
    if not isinstance(value, str) or not value or len(value) > 255 or set(value) & {"/", "\\", "\0"} or value == "..":
        _wrong(where, "the name of a file in the same folder", value)


def optional(check: Check) -> Check:
    """null, or what the other check expects."""

    def check_optional(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return check_optional


def array(check: Check, longest: int, shortest: int = 0) -> Check:
    """A list of so many items, each as the check expects."""

    def check_items(value: Any, where: str) -> None:
        if not isinstance(value, list) or not shortest <= len(value) <= longest:
            _wrong(where, f"a list of {shortest} to {longest} items", value)
        for index, item in enumerate(value):
            check(item, f"{where}[{index}]")

    return check_items


def row(*checks: Check) -> Check:
    """A list of as many items as there are checks, each as its own check expects."""

    def check_row(value: Any, where: str) -> None:
        if not isinstance(value, (list, tuple)) or len(value) != len(checks):
            _wrong(where, f"a list of {len(checks)} items", value)
        for check, item in zip(checks, value, strict=True):
            check(item, where)

    return check_row


def mapping(check: Check, longest: int = 100_000) -> Check:
    """An object with any names, each of its values as the check expects."""

    def check_values(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > longest:
            _wrong(where, f"an object of at most {longest} fields", value)
        for name, item in value.items():
            check(item, _inside(where, name))

    return check_values


def record(fields: Mapping[str, Check], required: Collection[str] = ()) -> Check:
    """An object: the fields named here are as their checks expect if they are there, others may be there too."""

    def check_fields(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _wrong(where, "an object", value)
        for name in required:
            if name not in value:
                raise UserError(f"{where} must have the field {name}")
        for name, check in fields.items():
            if name in value:
                check(value[name], _inside(where, name))

    return check_fields


def _inside(where: str, name: str) -> str:
    """file -> file: name; file: name -> file: name.other."""
    name = name[:60]
    separator = "." if ": " in where else ": "
    return where + separator + name


def parse_json(content: bytes | str, source: str, check: Check = anything, max_bytes: int = MAX_BYTES) -> Any:
    """The object in a JSON text, once it is what the check expects. Raises UserError that begins with the source."""
    if len(content) > max_bytes:
        raise UserError(f"{source} holds {len(content)} bytes of JSON, more than {max_bytes}: it is something else")
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{source} should hold a JSON object, is it truncated? Download it again")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [item for container in level for item in _items(container)]
    if level:
        raise UserError(f"{source} is nested deeper than {MAX_DEPTH} levels: it is something else")
    check(value, source)
    return value


def _items(container: Any) -> Iterator[Any]:
    values = container.values() if isinstance(container, dict) else container
    for value in values:
        if isinstance(value, (dict, list)):
            yield value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_json(file: Path, check: Check = anything, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises MissingFile, or UserError as parse_json."""
    if not file.exists():
        raise MissingFile(f"{file} does not exist")
    if not file.is_file():
        raise UserError(f"{file} should hold a JSON object, but is no regular file")
    size = file.stat().st_size
    if size > max_bytes:
        raise UserError(f"{file} has {size} bytes, more than {max_bytes}: it is something else")
    content: dict[str, Any] = parse_json(file.read_bytes(), str(file), check, max_bytes)
    return content
