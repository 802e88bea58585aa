"""The files of a run of wan_mini.generate, which has no folder of its own: names taken once, the state beside them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wan_mini.errors import UserError
from wan_mini.files import Unwritable, remove_partial
from wan_mini.runs.folder import locked

LATENTS = ".safetensors"
STATE = ".state.safetensors"
LONGEST_NAME = 200  # bytes; file systems take 255, and a file that is being written has a longer name than its own
OUTPUTS = (".mp4", ".webp", ".html")  # without ffmpeg, an mp4 becomes a webp


def lock_file(out: Path) -> Path:
    """What a run holds while it goes: a hidden file of its own, since the others are replaced, and a lock with them."""
    return out.with_name(f".{out.stem}.lock")


def state_file(out: Path) -> Path:
    """Where a run keeps what it has reached, beside the video that it is to write."""
    return out.with_suffix(STATE)


@contextmanager
def reserved(out: Path, *suffixes: str, resumed: bool = False) -> Iterator[None]:
    """Take the output's name with each of these suffixes, so that no other run can; the last one by an empty file.

    resumed: the names are those of this very run. What is still empty after an error is removed. Raises UserError
    unless the output is a video, and new; Unwritable, before anything is computed, if nothing can be written there.
    """
    if out.suffix not in (".mp4", ".webp"):
        raise UserError(f"--out must end in .mp4 or .webp, got {out}")
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        raise UserError(f"--out needs a name of at most {LONGEST_NAME} bytes, got one of {len(os.fsencode(out.name))}")
    for suffix in suffixes:
        file = out.with_suffix(suffix)
        if file.exists() and not resumed:
            raise UserError(f"{file} exists already: choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock_file(out).touch()
        file.touch(exist_ok=resumed)
    except FileExistsError:
        raise UserError(f"{out.parent} is no folder, or {file} exists already: choose another --out") from None
    except OSError as error:
        raise Unwritable(f"cannot write into {out.parent} ({error.strerror}): choose another --out") from None
    with locked(lock_file(out)):  # before anything is removed: it may be of a run that goes on
        try:
            if resumed:
                remove_partial(out.parent, f"{out.stem}.")
            yield
        finally:
            lock_file(out).unlink(missing_ok=True)
            if file.exists() and file.stat().st_size == 0:
                file.unlink()
