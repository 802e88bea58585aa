"""The program around a motion-transfer method: one run from files to files, or what a run would cost."""

import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from wan_mini.checkpoint import Checkpoint, read_checkpoint
from wan_mini.config import ClipConfig, latent_shape, token_grid
from wan_mini.device.flops import forward_flops
from wan_mini.device.memory import MemoryPlan, estimate, memory_table
from wan_mini.device.select import (
    attention_backend,
    compile_blocks,
    describe,
    pick_attention,
    pick_device,
    pick_dtype,
)
from wan_mini.device.timing import StageTimer
from wan_mini.files import remove_partial
from wan_mini.load import Wan, build_from_folder, build_preset, load_wan
from wan_mini.pipeline import SamplingConfig, Timer, Transfer
from wan_mini.runs.cli import refuse_flags
from wan_mini.runs.finish import finish
from wan_mini.runs.folder import ARROW_TILE, REPORT, Panel, check_room, locked, write_preview, write_result
from wan_mini.runs.provenance import sha256_clip, versions
from wan_mini.runs.record import RunFiles
from wan_mini.runs.report import write_report
from wan_mini.runs.request import (
    Method,
    Request,
    apply_flags,
    build_parser,
    load_preset,
    request_of,
    resumed_request,
)
from wan_mini.tiny import demo
from wan_mini.video import read_video


def program(method: Method, argv: list[str] | None) -> None:
    """Parse, then decode an old run, go on with one, print a new one's costs, or do it."""
    parser = build_parser(method)
    args = parser.parse_args(argv)
    if args.decode:
        refuse_flags(parser, argv, "--decode", ("decode", "model", "ref", "out", "set", "png", "device"))
        finish(args)
        return
    device = pick_device(args.device)
    timer = StageTimer(device)
    if args.resume:
        given = refuse_flags(parser, argv, "--resume", ("resume", "model", "ref", "device", "offload"))
        request = resumed_request(args, method, given)
        if request is None:
            print(f"{args.resume} is finished: there is nothing to do")
            return
        execute(method, request, open_model(request.model)[2] or request.model, timer, resumed=True)
        return
    dtype = pick_dtype(device, args.dtype)
    with timer("plan"):
        name, parts, checkpoint = open_model(args.model)
        clip, config = load_preset(preset_folder(args.model, name), method.config)
        clip, config = apply_flags(args, clip, config)
        plans = partial(plan_memory, method, parts, clip, config, dtype)
        if args.dry_run:
            print_costs(method, name, parts, clip, config, dtype)
            return
        request = request_of(args, clip, config, device, dtype, plans)
    execute(method, request, checkpoint or request.model, timer)


def open_model(model: Path | None) -> tuple[str, dict[str, nn.Module], Checkpoint | None]:
    """Name and weightless parts (meta) of a checkpoint folder, of a preset's name, or of the tiny model (None).

    The checkpoint's headers come along, so that loading need not read them again. Raises UserError or MissingFile.
    """
    if model is None:
        model = demo.CHECKPOINT
    if not model.exists():
        return *build_preset(str(model)), None
    checkpoint = read_checkpoint(model)
    return *build_from_folder(checkpoint), checkpoint


def preset_folder(model: Path | None, name: str) -> Path | None:
    """The folder whose motion.json holds for a model: its own, if it has one; for any copy of the tiny model, that."""
    if model is not None and (model / "motion.json").is_file():
        return model
    return demo.CHECKPOINT if name == "tiny" else model


def execute(
    method: Method, request: Request, model: Path | Checkpoint, timer: StageTimer, *, resumed: bool = False
) -> None:
    """Do one run with the model, in a new folder or in that of the run resumed. An error, or a stop, says how to go on.

    A new folder that would hold nothing worth keeping is removed.
    """
    files = RunFiles(method, request, timer, resumed=resumed)
    with locked(files.folder):
        remove_partial(files.folder)
        try:
            run_to_files(method, request, model, files)
        except BaseException as error:  # also Ctrl-C
            files.advise_next(error)
            raise


def run_to_files(method: Method, request: Request, model: Path | Checkpoint, files: RunFiles) -> None:
    """One run. What can fail cheaply comes first; the latents are saved before they are decoded."""
    timer = files.timer
    with timer("read"):
        clip, frames = read_reference(request)
        check_room(files.folder, 4 * math.prod(latent_shape(*frames.shape[:3])), frames.nbytes)
    with timer("load"):
        home = request.device if request.offload == "none" else torch.device("cpu")
        wan = load_wan(model, device=home, dtype=request.dtype)
        if request.compile:
            compile_blocks(wan.dit)
    files.begin(settings_of(method, request, clip, frames), machine(request, wan))
    size = f"{len(frames)} frames of {clip.width}x{clip.height}"
    print(f"{wan.name} on {compute_line(request)}, seed {request.seed}, {size} to {files.folder}")
    options = {
        "seed": request.seed,
        "device": request.device,
        "offload_blocks": request.offload == "blocks",
        "recompute": request.recompute,
    }
    transfer = partial(method.transfer, wan, frames, request.prompt, **options)
    stages = announced(timer)
    with attention_backend(pick_attention(request.device)):
        journal = files.journal("state")
        result = transfer(request.config, timer=stages, on_latents=files.save, **journal)
        panels = {"reference": (frames, result.flows[0]), "result": (shown(result), result.flows[1])}
        with timer("write"):
            written = [write_result(files.folder, shown(result), files.settings, png=request.png)]
        if request.unguided and request.config != method.unguided(request.config):
            with stages("unguided"):
                plain = transfer(method.unguided(request.config), **files.journal("state-unguided"))
            panels["without guidance"] = shown(plain), plain.flows[1]
    with timer("write"):
        written.append(write_preview(files.folder, panels, files.settings, tile=ARROW_TILE))
        written.append(write_report(files.folder / REPORT, panels, files.record("finished", result)))
    files.end(result)
    print("wrote", ", ".join(str(file) for file in written))
    print_summary(request, timer, result, panels)


def announced(timer: StageTimer) -> Timer:
    """The timer, which says when a stage begins for the first time, in a log; on a terminal there is a bar."""
    begun = set()

    def stage(name: str) -> AbstractContextManager[None]:
        if name not in begun and sys.stderr is not None and not sys.stderr.isatty():
            print(f"{timer.elapsed():8.1f} s  {name}", file=sys.stderr, flush=True)
        begun.add(name)
        return timer(name)

    return stage


def read_reference(request: Request) -> tuple[ClipConfig, np.ndarray]:
    """The reference's frames (T,H,W,3) uint8, and its size, which is shorter if the file is."""
    clip = request.clip
    frames = read_video(request.ref, size=(clip.height, clip.width), frames=clip.frames, fps=clip.fps)
    if len(frames) < clip.frames:
        print(f"note: {request.ref} is shorter than {clip.frames} frames, so {len(frames)} are used")
    return ClipConfig(clip.height, clip.width, len(frames), clip.fps), frames


def settings_of(method: Method, request: Request, clip: ClipConfig, frames: np.ndarray) -> dict[str, Any]:
    """What a result depends on: kept beside the latents, in run.json and in every file's metadata."""
    return {
        "ai_generated": True,
        "program": method.prog,
        "model": str(request.model.resolve()),
        "ref": str(request.ref.resolve()),
        "ref_sha256": sha256_clip(frames),
        "prompt": request.prompt,
        "seed": request.seed,
        "device": request.device.type,
        "dtype": str(request.dtype),
        "clip": asdict(clip),
        "config": asdict(request.config),
    }


def compute_line(request: Request) -> str:
    """Device, dtype and attention backend of a run, in one line."""
    return describe(request.device, request.dtype, pick_attention(request.device))


def machine(request: Request, wan: Wan) -> dict[str, Any]:
    """What a run's costs depend on besides, and the files that it read."""
    return {
        "compute": compute_line(request),
        "offload": request.offload,
        "recompute": request.recompute,
        "compile": request.compile,
        "png": request.png,
        "unguided": request.unguided,
        "versions": versions(),
        "checkpoint_sha256": wan.hashes,
    }


def shown(result: Transfer) -> np.ndarray:
    """The decoded frames (T,H,W,3) uint8 of a whole transfer."""
    if result.frames is None:
        raise RuntimeError("the transfer was not decoded")
    return result.frames


def print_summary(request: Request, timer: StageTimer, result: Transfer, panels: Mapping[str, Panel]) -> None:
    """Seconds and memory of each stage; for the default clip and prompt, how well the results follow the reference."""
    for stage, cost in timer.table.items():
        print(f"{stage:9} {cost['seconds']:8.1f} s  peak {cost['peak_gb']} GB")
    print(f"{'total':9} {timer.total():8.1f} s")
    recompute = result.report["recompute"]
    if recompute != "none":
        print(f"a gradient recomputed, to fit into memory: {recompute} (dit.RECOMPUTE says what)")
    if demo.is_default(panels["reference"][0], request.prompt):
        for name, (pixels, _) in panels.items():
            if name != "reference":
                print(f"{name}: {demo.summary(pixels)}")


def plan_memory(
    method: Method, parts: Mapping[str, nn.Module], clip: ClipConfig, config: SamplingConfig, dtype: torch.dtype
) -> list[MemoryPlan]:
    """The memory of every way to run a transfer, for weightless parts."""
    return estimate(
        parts,
        dtype=dtype,
        video_shape=(1, 3, clip.frames, clip.height, clip.width),
        latent_shape=latent_shape(clip.frames, clip.height, clip.width),
        cfg_passes=1 if config.cfg == 1 else 2,
        vae_tile=config.vae_tile,
        gradient=method.gradient(config),
    )


def print_costs(
    method: Method, name: str, parts: Mapping[str, Any], clip: ClipConfig, config: SamplingConfig, dtype: torch.dtype
) -> None:
    """Print what a run would cost, from the sizes of the parts alone."""
    dit = parts["dit"]
    grid = token_grid(clip.frames, clip.height, clip.width)
    frames, rows, columns = grid
    tokens = frames * rows * columns
    counts = []
    for part, module in parts.items():
        millions = sum(p.numel() for p in module.parameters()) / 1e6
        counts.append(f"{part} {millions:,.1f} M")
    passes = 1 if config.cfg == 1 else 2
    denoising = config.steps * passes * forward_flops(dit.config, tokens)
    print(f"model        {name}: {', '.join(counts)}")
    print(f"clip         {clip.frames} frames of {clip.width}x{clip.height} at {clip.fps:g} a second")
    print(f"tokens       {frames} x {rows} x {columns} = {tokens}")
    for line in method.costs(config, dit, grid):
        print(line)
    print(f"denoising    {config.steps} steps of {passes} passes, {denoising / 1e12:,.1f} TFLOP")
    print(f"memory of a GPU in GB, weights in {dtype}, by what is offloaded and what a gradient recomputes:")
    print(memory_table(plan_memory(method, parts, clip, config, dtype)))
