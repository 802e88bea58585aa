"""Files that are written whole or not at all: the only place of the product that writes a run's files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from wan_mini.errors import UserError


class Unwritable(UserError, OSError):
    """A file that cannot be written: a full disk, a folder without permission."""


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A hidden file beside `path`, in a folder made for it, that takes its name after the `with`.

    Its bytes are on the disk before it is renamed, so that `path` is never half a file: not after an error, a kill or
    a power cut. An older file of that name stays until then. Raises Unwritable, which names the file.
    """
    partial = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise Unwritable(f"cannot write into {path.parent} ({error.strerror}): choose another folder") from error
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except UserError:
        raise
    except OSError as error:
        raise Unwritable(f"cannot write {path} ({error.strerror or error}): make room, or choose another") from error
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole. Raises Unwritable."""
    with write_whole(path) as partial:
        partial.write_bytes(data)


def partial_name(path: Path) -> Path:
    """The hidden file that becomes `path`: another one for each process."""
    return path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")


def remove_partial(folder: Path, stem: str = "") -> None:
    """Remove what killed processes have left half written in a folder: of files whose names begin so, or of all."""
    for file in folder.glob(f".{escape(stem)}*.part*"):
        file.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk. Of folders, Windows knows nothing."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
