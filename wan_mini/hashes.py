"""SHA-256 of weight files without a second pass over them: from a cache, or from what a loader reads anyway."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from wan_mini.json_file import read_json

Tensors = Iterator[tuple[str, Tensor]]  # (key, tensor)
CHUNK = 2**24  # bytes
SETTLED = 2_000_000_000  # nanoseconds; a file that changed later may change again within the clock's resolution


def sha256_file(file: Path) -> str:
    """SHA-256 of a file, read in pieces: it may be larger than the memory."""
    sha256 = hashlib.sha256()
    with file.open("rb") as stream:
        _hash_next(sha256, stream, file.stat().st_size)
    return sha256.hexdigest()


def cache_folder() -> Path:
    """The user's cache folder for this project: below XDG_CACHE_HOME, or else below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not base:
        base = os.path.expanduser("~/.cache")  # noqa: PTH111 (pathlib's raises where there is no home)
    return Path(base) / "fastvmt-mini"


class HashCache:
    """SHA-256 of files that were hashed before, valid while a file's path, size and time of change stay the same.

    A cache that cannot be read or written is no error: files are then hashed again.
    """

    def __init__(self) -> None:
        self.path = cache_folder() / "sha256.json"
        self.entries: dict[str, list[int | str]] = {}  # {path: [size, time of change in ns, SHA-256]}
        with suppress(OSError, ValueError):
            self.entries = read_json(self.path)

    def get(self, file: Path) -> str | None:
        """The hash of a file that has not changed since it was stored, or None."""
        size, changed = _version(file)
        entry = self.entries.get(str(file.absolute()))
        if not isinstance(entry, list) or len(entry) != 3 or entry[:2] != [size, changed]:
            return None
        return str(entry[2])

    def store(self, file: Path, version: tuple[int, int], sha256: str) -> None:
        """Keep a file's hash, and forget files that are gone. version: the file's before it was read."""
        settled = time.time_ns() - version[1] > SETTLED
        if not settled or _version(file) != version:
            return
        self.entries[str(file.absolute())] = [*version, sha256]
        for path in list(self.entries):
            is_there = False
            with suppress(OSError):  # of a folder or disk that may not be looked at
                is_there = Path(path).exists()
            if not is_there:
                del self.entries[path]
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            written = self.path.with_suffix(f".{os.getpid()}")
            written.write_text(json.dumps(self.entries, indent=1), encoding="utf-8")
            written.replace(self.path)  # in one step, so that no reader finds half a cache


class FileHasher:
    """Hashes files beside the loader that reads them; `digests` is {file: SHA-256} of those read to the end.

        hasher = FileHasher()
        for key, tensor in hasher.watch(file, read_tensors(file, keys)):
            ...  # a thread hashes this tensor meanwhile

    The thread reads the file itself, as many bytes as the tensor has, so that both find them in the system's cache: a
    tensor that it read by the map would keep pages in this process's memory.
    """

    def __init__(self) -> None:
        self.digests: dict[Path, str] = {}
        self.cache = HashCache()

    def watch(self, file: Path, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor) of all tensors of a file, and hash the file meanwhile."""
        known = self.cache.get(file)
        if known is not None:
            yield from tensors
            self.digests[file] = known
            return
        version = _version(file)
        sha256 = hashlib.sha256()
        with file.open("rb") as stream, ThreadPoolExecutor(max_workers=1) as worker:
            for key, tensor in tensors:
                update = worker.submit(_hash_next, sha256, stream, tensor.nbytes)
                yield key, tensor
                del tensor  # so that one tensor of the file is held at a time
                update.result()
            _hash_next(sha256, stream, version[0])  # what is no tensor, or was left out
        self.digests[file] = sha256.hexdigest()
        self.cache.store(file, version, self.digests[file])


def _hash_next(sha256: Any, stream: BinaryIO, size: int) -> None:
    """Hash the next bytes of a file, at most `size` of them; hashlib releases the interpreter's lock."""
    while size > 0:
        piece = stream.read(min(size, CHUNK))
        if not piece:
            return
        sha256.update(piece)
        size -= len(piece)


def _version(file: Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
