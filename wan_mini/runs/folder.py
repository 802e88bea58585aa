"""The folder of a run: latents and settings, the result, a preview; written once, read again to decode."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wan_mini.config import token_grid
from wan_mini.errors import MissingFile, UserError
from wan_mini.json_file import read_json
from wan_mini.runs.label import with_label
from wan_mini.runs.preview import side_by_side, with_arrows
from wan_mini.runs.provenance import GENERATED, XMP, XMP_KEYWORD
from wan_mini.video import write_video

Panel = tuple[np.ndarray, Tensor]  # frames (T,H,W,3) uint8 and their motion flow (F-1,S,2)


def check_new_folder(folder: Path) -> Path:
    """Return the folder, if a run may be written there. Raises UserError if it holds one or cannot be made."""
    if (folder / "latents.safetensors").exists():
        raise UserError(f"{folder} already holds a run: choose another --out")
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = f"{existing} is not a folder one may write to"
        raise UserError(f"cannot write into {folder}, because {reason}: choose another")
    return folder


def save_tensors(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write what it takes to decode later, in a folder made for it; the same run gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_host, path, {"settings": json.dumps(settings)})


def load_tensors(path: Path, names: list[str]) -> tuple[list[Tensor], dict[str, Any]]:
    """Read these tensors and the settings of a save_tensors file. Raises MissingFile, or UserError if it is none."""
    if not path.is_file():
        raise MissingFile(f"{path} does not exist: give the .safetensors file of a run")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = [file.get_tensor(name) for name in names]
            return tensors, json.loads(file.metadata()["settings"])
    except (SafetensorError, TypeError, KeyError) as problem:
        raise UserError(f"{path} holds no run's {' and '.join(names)} ({problem})") from None


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a run's settings, costs and versions as JSON."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_result(
    folder: Path, panels: Mapping[str, Panel], settings: Mapping[str, Any], *, tile: tuple[int, int], png: bool = False
) -> list[Path]:
    """Write result.mp4, the preview of all panels with an arrow per tile, and on request the frames as PNG.

    panels: {"reference": ..., "result": ..., ...}; tile: rows and columns of tokens that share an arrow. Every file
    says that it was generated and how. Returns the files of the result and of the preview.
    """
    label = public_label(settings)
    fps = settings["clip"]["fps"]
    frames, flow = panels["result"]
    frames = with_label(frames, settings.get("label", ""))
    panels = {**panels, "result": (frames, flow)}
    grid = token_grid(*frames.shape[:3])
    clips = {}
    for name, (pixels, flow) in panels.items():
        clips[name] = with_arrows(pixels, flow, grid, tile)
    result = write_video(folder / "result.mp4", frames, fps, label)
    preview = write_video(folder / "preview.webp", side_by_side(clips), fps, label)
    if png:
        write_pictures(folder, frames, label)
    return [result, preview]


def public_label(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for a generated file: all settings, and of paths only the last name."""
    names: dict[str, Any] = {name: Path(settings[name]).name for name in ("model", "ref")}
    names["loras"] = [Path(lora).name for lora in settings.get("loras", [])]
    return {**settings, **names, **GENERATED}


def write_pictures(folder: Path, frames: np.ndarray, label: Mapping[str, Any]) -> None:
    """Write frames (T,H,W,3) uint8 as frame0000.png, frame0001.png, ..."""
    for number, frame in enumerate(frames):
        info = PngInfo()
        info.add_itxt("Description", json.dumps(label))
        info.add_itxt(XMP_KEYWORD, XMP)
        Image.fromarray(frame).save(folder / f"frame{number:04d}.png", pnginfo=info)


def read_preset(folder: Path | None) -> dict[str, dict[str, Any]]:
    """The options in a checkpoint folder's motion.json, {"clip": {...}, "motion": {...}}; empty where it has none."""
    file = None if folder is None else folder / "motion.json"
    if file is None or not file.is_file():
        return {}
    preset = read_json(file)
    if not all(isinstance(part, dict) for part in preset.values()):
        raise UserError(f'{file} must hold objects named "clip" and "motion", got {preset}')
    return preset
