"""The folder of a run: latents and settings, the result, a preview; taken once, read again to decode or go on."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from wan_mini.config import token_grid
from wan_mini.errors import MissingFile, UserError
from wan_mini.files import Unwritable, write_bytes, write_whole
from wan_mini.json_file import parse_json, read_json
from wan_mini.runs.label import with_label
from wan_mini.runs.preview import side_by_side, with_arrows
from wan_mini.runs.provenance import GENERATED, XMP, XMP_KEYWORD
from wan_mini.runs.settings import RUN
from wan_mini.video import write_video

RECORD = "run.json"
REPORT = "report.html"
LATENTS = "latents.safetensors"
FLOWS = ("flow_reference", "flow_result")  # their names beside the latents
ARROW_TILE = (3, 4)  # tokens, rows and columns that share an arrow of the preview
Panel = tuple[np.ndarray, Tensor]  # frames (T,H,W,3) uint8 and their motion flow (F-1,S,2)


def new_folder(out: Path | None, root: Path = Path("outputs")) -> Path:
    """Make the folder of a run and take it, so that no other run can: by creating its run.json.

    out: what the user named, else a name of its own, the time, below root. An empty folder may be taken. Raises
    Unwritable, before anything is computed, if nothing can be written there; UserError if it holds anything.
    """
    folder = root / time.strftime("%Y%m%d-%H%M%S") if out is None else out
    number = 1
    while out is None and folder.exists():  # of a run that began in the same second
        number += 1
        folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{number}"
    try:
        folder.mkdir(parents=True, exist_ok=out is not None)  # a name of its own is new, or another run was faster
        for file in folder.iterdir():
            raise UserError(f"{folder} already holds {file.name}: choose another --out")
        with (folder / RECORD).open("x", encoding="utf-8") as record:
            record.write("{}\n")
    except FileExistsError:
        if out is None:
            return new_folder(None, root)
        raise UserError(f"{folder} already holds a run or is a file: choose another --out") from None
    except OSError as error:
        raise Unwritable(f"cannot write into {folder} ({error.strerror}): choose another --out") from None
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, or a file of it, so that no other process resumes a run that is going; a kill lets it go.

    Raises UserError if another process holds it. Windows, and some network disks, know no such locks.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is of a run that is still going: wait for it, or stop it") from None
        except OSError:
            print(f"note: {folder} cannot be locked: do not resume this run while it goes")
        yield
    finally:
        os.close(handle)


def remove_empty_run(folder: Path) -> None:
    """Remove the folder of a run that stopped before it had computed anything worth keeping."""
    names = [file.name for file in folder.iterdir()]
    if names == [RECORD]:
        (folder / RECORD).unlink()
        folder.rmdir()


def states(folder: Path) -> list[Path]:
    """The files that a run could go on from."""
    return sorted(folder.glob("state*"))


def remove_states(folder: Path) -> None:
    """Remove the states of a run that has its result."""
    for file in states(folder):
        file.unlink(missing_ok=True)


def check_room(folder: Path, latents: int, video: int) -> None:
    """Raises UserError if the disk has no room for a run; latents, video: bytes of the latents and of a raw clip.

    The latents are there up to six times (the file, the state before and after a save), and all pictures together take
    less than the raw clip.
    """
    need = 6 * latents + video
    free = shutil.disk_usage(folder).free
    if free < need:
        message = f"a run needs about {need / 1e6:.1f} MB in {folder}, and {free / 1e6:.1f} MB are free"
        raise Unwritable(f"{message}: make room, or choose another --out")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], **more: Any) -> None:
    """Write what it takes to decode later, or to go on; the same run gives the same bytes. Raises Unwritable."""
    on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {name: json.dumps(value) for name, value in {"settings": settings, **more}.items()}
    write_bytes(path, save(on_host, metadata))


def save_latents(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Path:
    """save_tensors, but where the disk is full, the file goes to a new folder in another place. Returns its path."""
    try:
        save_tensors(path, tensors, settings)
        return path
    except Unwritable as error:
        failure = error
    for root in (Path(tempfile.gettempdir()), Path.home(), Path.cwd()):
        with suppress(OSError):
            second = Path(tempfile.mkdtemp(prefix=f"{path.parent.name[:40]}-", dir=root)) / path.name
            save_tensors(second, tensors, settings)
            print(f"note: {failure}; the latents are in {second} instead", file=sys.stderr)
            return second
    raise failure


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the settings of a save_tensors file. Raises MissingFile, or UserError if it is none."""
    if not path.is_file():
        raise MissingFile(f"{path} does not exist: give the .safetensors file of a run")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
            settings = parse_json(file.metadata()["settings"], str(path), RUN)
    except UserError:
        raise
    except (SafetensorError, TypeError, KeyError, ValueError) as problem:
        raise UserError(f"{path} holds no run's latents ({problem}): give the .safetensors file of a run") from None
    return tensors, settings


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a run's settings, costs and versions as JSON."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"))  # a name may hold bytes that are no text


def write_result(folder: Path, frames: np.ndarray, settings: Mapping[str, Any], *, png: bool = False) -> Path:
    """Write frames (T,H,W,3) uint8 as result.mp4, and on request as PNG; each file says that it was generated and how.

    Returns the file of the video.
    """
    label = public_label(settings)
    frames = with_label(frames, settings.get("label", ""))
    result = write_video(folder / "result.mp4", frames, settings["clip"]["fps"], label)
    if png:
        write_pictures(folder, frames, label)
    return result


def write_preview(
    folder: Path, panels: Mapping[str, Panel], settings: Mapping[str, Any], *, tile: tuple[int, int]
) -> Path:
    """Write all panels side by side, with an arrow per tile, as preview.webp.

    panels: {"reference": ..., "result": ..., ...}; tile: rows and columns of tokens that share an arrow.
    """
    fps = settings["clip"]["fps"]
    clips = {}
    for name, (pixels, flow) in panels.items():
        clips[name] = with_arrows(pixels, flow, token_grid(*pixels.shape[:3]), tile)
    return write_video(folder / "preview.webp", side_by_side(clips), fps, public_label(settings))


def public_label(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for a generated file: all settings, and of paths only the last name."""
    paths = [name for name in ("model", "ref", "save", "load") if settings.get(name)]
    names: dict[str, Any] = {name: Path(settings[name]).name for name in paths}
    names["loras"] = [Path(lora).name for lora in settings.get("loras", [])]
    return {**settings, **names, **GENERATED}


def write_pictures(folder: Path, frames: np.ndarray, label: Mapping[str, Any]) -> None:
    """Write frames (T,H,W,3) uint8 as frame0000.png, frame0001.png, ..."""
    for number, frame in enumerate(frames):
        info = PngInfo()
        info.add_itxt("Description", json.dumps(label))
        info.add_itxt(XMP_KEYWORD, XMP)
        with write_whole(folder / f"frame{number:04d}.png") as partial:
            Image.fromarray(frame).save(partial, pnginfo=info)


def read_preset(folder: Path | None) -> dict[str, dict[str, Any]]:
    """The options in a checkpoint folder's motion.json, {"clip": {...}, "motion": {...}}; empty where it has none."""
    file = None if folder is None else folder / "motion.json"
    if file is None or not file.is_file():
        return {}
    preset = read_json(file)
    if not all(isinstance(part, dict) for part in preset.values()):
        raise UserError(f'{file} must hold objects named "clip" and "motion", got {preset}')
    return preset
