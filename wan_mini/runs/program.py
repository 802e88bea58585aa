"""The program around a motion-transfer method: one run from files to files, or what a run would cost."""

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from wan_mini.attention import OneProcess
from wan_mini.checkpoint import Checkpoint, read_checkpoint
from wan_mini.config import ClipConfig, latent_shape, token_grid
from wan_mini.device.host import fit_dtype
from wan_mini.device.parallel import open_ranks
from wan_mini.device.select import (
    attention_backend,
    compile_blocks,
    describe,
    device_of_process,
    pick_attention,
    pick_dtype,
)
from wan_mini.device.timing import StageTimer, announced
from wan_mini.files import remove_partial
from wan_mini.load import Wan, build_from_folder, build_preset, load_wan
from wan_mini.pipeline import Transfer
from wan_mini.runs.cli import refuse_flags, with_options
from wan_mini.runs.dry_run import plan_memory, print_costs
from wan_mini.runs.finish import finish
from wan_mini.runs.folder import (
    ARROW_TILE,
    REPORT,
    Panel,
    check_room,
    locked,
    public_label,
    write_preview,
    write_result,
)
from wan_mini.runs.jobs import run_jobs
from wan_mini.runs.label import with_label
from wan_mini.runs.provenance import GENERATED, sha256_clip, versions
from wan_mini.runs.record import RunFiles
from wan_mini.runs.report import write_report
from wan_mini.runs.request import Method, Request, apply_flags, build_parser, request_of, resumed_request
from wan_mini.tiny import demo
from wan_mini.video import read_video, remarks, write_video


def program(method: Method, argv: list[str] | None) -> int:
    """Parse, then decode an old run, go on with one, print a new one's costs, do it, or do many.

    Returns 1 if one of many failed, else 0.
    """
    parser = build_parser(method)
    args = parser.parse_args(argv)
    loader = Loader()
    if args.decode:
        refuse_flags(parser, argv, "--decode", ("decode", "model", "ref", "out", "set", "png", "device"))
        finish(args)
        return 0
    if args.resume:
        given = refuse_flags(parser, argv, "--resume", ("resume", "model", "ref", "device", "offload"))
        resume(method, args, given, loader)
        return 0
    device = device_of_process(args.device)
    if args.jobs is not None:
        run_one = partial(start, method, device=device, ranks=OneProcess(), loader=loader)
        return run_jobs(args, parser, sys.argv[1:] if argv is None else argv, run_one)
    with open_ranks(args.parallel, device) as ranks:
        start(method, args, device, ranks, loader)
    return 0


class Loader:
    """Loads models as requests need them, and keeps the last one for the next run."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.wan: Wan | None = None

    def __call__(self, request: Request, model: Path | Checkpoint) -> Wan:
        """The request's model; model: its folder, or that folder's headers."""
        home = request.device if request.offload == "none" else torch.device("cpu")
        on_demand = request.offload == "parts" and request.device.type == "cpu"  # nowhere else to offload to
        key = (request.model, home, request.dtype, request.compile, request.loras, on_demand)
        if self.wan is None or self.key != key:
            self.wan = load_wan(model, device=home, dtype=request.dtype, loras=request.loras, on_demand=on_demand)
            self.key = key
            if request.compile:
                compile_blocks(self.wan.dit)
        return self.wan


def resume(method: Method, args: Namespace, given: set[str], loader: Loader) -> None:
    """Go on with the run in the folder args.resume; given: the names of the flags on the command line."""
    request = resumed_request(args, method, given)
    if request is None:
        print(f"{args.resume} is finished: there is nothing to do")
        return
    timer = StageTimer(request.device)
    checkpoint = open_model(request.model)[2]
    load = partial(loader, request, checkpoint or request.model)
    execute(method, request, load, timer, OneProcess(), resumed=True)


def start(method: Method, args: Namespace, device: torch.device, ranks: OneProcess, loader: Loader) -> None:
    """What the command line asks for, in one of the processes of a run."""
    dtype = pick_dtype(device, args.dtype)
    timer = StageTimer(device)
    with timer("plan"):
        name, parts, checkpoint = open_model(args.model)
        clip, config = method.load_preset(preset_folder(args.model, name), method.config)
        if getattr(args, "preset", None) is not None:
            config = with_options(config, method.presets[args.preset], "--preset")
        clip, config = apply_flags(args, clip, config)
        if checkpoint is not None and not args.dry_run:
            dtype = fit_dtype(parts, dtype, device, offload=args.offload, named=args.dtype is not None)
        plans = partial(plan_memory, method, parts, clip, config, dtype)
        if args.dry_run:
            print_costs(method, name, parts, clip, config, dtype)
            return
        request = request_of(args, clip, config, device, dtype, plans)
        tokens = prod(token_grid(clip.frames, clip.height, clip.width))
        ranks.check(parts["dit"].config, tokens, request.offload)
    execute(method, request, partial(loader, request, checkpoint or request.model), timer, ranks)


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
    method: Method,
    request: Request,
    load: Callable[[], Wan],
    timer: StageTimer,
    ranks: OneProcess,
    *,
    resumed: bool = False,
) -> None:
    """Do one run with the model that `load` gives, in a new folder or in that of the run resumed.

    An error, or a stop, says how to go on. A new folder that would hold nothing worth keeping is removed.
    """
    files = RunFiles(method, request, timer, resumed=resumed, writes=ranks.writes)
    with ExitStack() as stack:
        if ranks.writes:
            stack.enter_context(locked(files.folder))
            remove_partial(files.folder)
        try:
            run_to_files(method, request, load, files, ranks)
        except BaseException as error:  # also Ctrl-C
            files.advise_next(error)
            raise


def run_to_files(method: Method, request: Request, load: Callable[[], Wan], files: RunFiles, ranks: OneProcess) -> None:
    """One run. What can fail cheaply comes first; the latents are saved before they are decoded."""
    timer = files.timer
    with timer("read"):
        clip, frames = read_reference(request)
        if ranks.writes:
            check_room(files.folder, 4 * prod(latent_shape(*frames.shape[:3])), frames.nbytes)
    with timer("load"):
        wan = load()
        ranks.share(wan.dit)
    with timer("write"):
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
        labeled = with_label(shown(result), request.label)
        panels = {"reference": (frames, result.flows[0]), "result": (labeled, result.flows[1])}
        written = []
        if ranks.writes:
            with timer("write"):
                written.append(write_result(files.folder, shown(result), files.settings, png=request.png))
        if request.unguided and request.config != method.unguided(request.config):
            with stages("unguided"):
                plain = transfer(method.unguided(request.config), **files.journal("state-unguided"))
            panels["without guidance"] = shown(plain), plain.flows[1]
    if not ranks.writes:
        return
    with timer("write"):
        written.append(write_preview(files.folder, panels, files.settings, tile=ARROW_TILE))
        for name, pixels in result.others.items():
            video = files.folder / f"{name}.webp"
            written.append(write_video(video, pixels, clip.fps, public_label(files.settings)))
        written.append(write_report(files.folder / REPORT, panels, files.record("finished", result)))
    files.end(result)
    print("wrote", ", ".join(str(file) for file in written))
    print_summary(request, timer, result, panels)


def read_reference(request: Request) -> tuple[ClipConfig, np.ndarray]:
    """The reference's frames (T,H,W,3) uint8, and its size, which is shorter if the file is."""
    clip = request.clip
    frames = read_video(request.ref, size=(clip.height, clip.width), frames=clip.frames, fps=clip.fps)
    if len(frames) < clip.frames:
        print(f"note: {request.ref} is shorter than {clip.frames} frames, so {len(frames)} are used")
    for remark in remarks(frames):
        print(f"note: {remark}")
    return ClipConfig(clip.height, clip.width, len(frames), clip.fps), frames


def settings_of(method: Method, request: Request, clip: ClipConfig, frames: np.ndarray) -> dict[str, Any]:
    """What a result depends on: kept beside the latents, in run.json and in every file's metadata."""
    return {
        **GENERATED,
        "program": method.prog,
        **method.flags,
        "model": str(request.model.resolve()),
        "ref": str(request.ref.resolve()),
        "ref_sha256": sha256_clip(frames),
        "prompt": request.prompt,
        "seed": request.seed,
        "loras": [str(lora) for lora in request.loras],
        "label": request.label,
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
        "parallel": wan.dit.ranks.name,
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
