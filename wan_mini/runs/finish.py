"""`--decode`: from a run's saved latents to its result."""

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_mini.config import ClipConfig, latent_shape, token_grid
from wan_mini.device.select import DTYPES, pick_device
from wan_mini.errors import UserError
from wan_mini.load import load_vae
from wan_mini.pipeline import SamplingConfig, decode
from wan_mini.runs.cli import parse_pairs, with_options
from wan_mini.runs.folder import (
    ARROW_TILE,
    FLOWS,
    RECORD,
    REPORT,
    Panel,
    load_tensors,
    new_folder,
    remove_empty_run,
    remove_states,
    write_preview,
    write_record,
    write_result,
)
from wan_mini.runs.label import with_label
from wan_mini.runs.provenance import sha256_clip
from wan_mini.runs.record import old_record
from wan_mini.runs.report import write_report
from wan_mini.video import read_video

OUTPUTS = ("result.*", "preview.webp", REPORT, "frame*.png")


@dataclass(frozen=True)
class Saved:
    """A run's latents (1,16,F,h,w), its flows (F-1,S,2) if it has some, and what it takes to decode them."""

    latents: Tensor
    flows: tuple[Tensor, ...]
    settings: dict[str, Any]
    clip: ClipConfig
    config: SamplingConfig
    dtype: torch.dtype
    folder: Path  # of the file, where the run's record may be


def read_saved(path: Path) -> Saved:
    """Read the latents of a transfer, or of wan_mini.generate. Raises UserError if they are damaged or none."""
    tensors, settings = load_tensors(path)
    try:
        clip = with_options(ClipConfig(), _known(ClipConfig(), settings.get("clip", settings)), f"{path}: clip")
        options = _known(SamplingConfig(), settings.get("config", settings))
        config = with_options(SamplingConfig(), options, f"{path}: config")
        dtype = DTYPES[settings["dtype"].removeprefix("torch.")]
        latents = tensors["latents"]
        flows = tuple(tensors[name] for name in FLOWS if name in tensors)
    except UserError as problem:
        reason = str(problem).removeprefix(f"{path}: ")
        raise UserError(f"{path}: {reason}: the file is damaged, or of another version") from None
    except (KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path} holds no run's latents ({problem}): give the latents.safetensors of a run") from None
    shape = latent_shape(clip.frames, clip.height, clip.width)
    if latents.shape != shape:
        got = tuple(latents.shape)
        raise UserError(f"{path} needs latents {shape} as its settings say, got {got}: the run is lost")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise UserError(f"{path} needs finite numbers of float32, got others in {name}: the run is lost")
    grid = token_grid(clip.frames, clip.height, clip.width)
    for flow in flows:
        if flow.shape != (grid[0] - 1, math.prod(grid[1:]), 2):
            raise UserError(f"{path} has a flow {tuple(flow.shape)}, which is not its clip's: the file is damaged")
    return Saved(latents, flows, settings, clip, config, dtype, path.parent)


def _known(config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that are fields of a config. Raises TypeError if there are none by name."""
    if not isinstance(options, Mapping):
        raise TypeError(f"options are {options}")
    return {field.name: options[field.name] for field in fields(config) if field.name in options}


def decode_saved(saved: Saved, model: Path, device: torch.device, tile: int | None) -> np.ndarray:
    """The frames (T,H,W,3) uint8 of saved latents, decoded in the run's dtype."""
    vae = load_vae(model, device=device, dtype=torch.float32)
    return decode(vae, saved.latents, tile=tile, dtype=saved.dtype)


def finish(args: Namespace) -> None:
    """Decode the latents of a transfer, and write its result beside them or to --out.

    The reference is needed for the preview alone. Raises UserError if anything would be overwritten.
    """
    saved = read_saved(args.decode)
    if len(saved.flows) < len(FLOWS) or "clip" not in saved.settings:
        raise UserError(f"{args.decode} is of no motion transfer: use python -m wan_mini.generate --decode")
    options = parse_pairs(args.set)
    if options.keys() - {"vae_tile"}:
        raise UserError(f"--decode takes --set vae_tile=PIXELS only, got {', '.join(options)}: the rest is computed")
    tile = with_options(saved.config, options, "--set").vae_tile
    device = pick_device(args.device)
    settings = saved.settings
    if args.out is None:
        check_no_output(args.decode.parent)
    reference = read_old_reference(args.ref, saved)
    model = args.model or Path(str(settings.get("model", "")))
    folder = args.decode.parent if args.out is None else new_folder(args.out)
    try:
        frames = decode_saved(saved, model, device, tile)
        written = write_files(folder, frames, reference, saved, png=args.png)
    except BaseException:
        if args.out is not None:
            remove_empty_run(folder)
        raise
    remove_states(folder)
    print("wrote", ", ".join(str(file) for file in written))


def write_files(
    folder: Path, frames: np.ndarray, reference: np.ndarray | None, saved: Saved, *, png: bool
) -> list[Path]:
    """Write decoded frames (T,H,W,3) uint8 as a run does: result, preview, page, and its record; returns the others."""
    settings = saved.settings
    frames = with_label(frames, settings.get("label", ""))
    written = [write_result(folder, frames, settings, png=png)]
    panels: dict[str, Panel] = {}
    if reference is not None:
        panels["reference"] = (reference, saved.flows[0])
    panels["result"] = (frames, saved.flows[1])
    written.append(write_preview(folder, panels, settings, tile=ARROW_TILE))
    record = old_record(saved.folder, settings)
    written.append(write_report(folder / REPORT, panels, record))
    write_record(folder / RECORD, record)
    return written


def check_no_output(folder: Path) -> None:
    """Raises UserError if a folder has a result already, or a part of one."""
    for pattern in OUTPUTS:
        for file in folder.glob(pattern):
            raise UserError(f"{folder} already holds {file.name}: choose another folder with --out")


def read_old_reference(ref: Path | None, saved: Saved) -> np.ndarray | None:
    """The run's reference (T,H,W,3) uint8, or None and a note if it is no longer where it was.

    Raises UserError if `ref`, which the user names, is another clip.
    """
    clip = saved.clip
    path = ref or Path(str(saved.settings.get("ref", "reference")))
    problem = "is not the run's clip"
    try:
        frames = read_video(path, size=(clip.height, clip.width), frames=clip.frames, fps=clip.fps)
        if sha256_clip(frames) == saved.settings.get("ref_sha256"):
            return frames
    except (UserError, OSError) as error:
        problem = f"cannot be read ({error})"
    if ref is not None:
        raise UserError(f"--ref {ref} {problem}: leave it out, only the preview needs it")
    print(f"note: {path} {problem}, so the preview shows the result alone; --ref names another place")
    return None
