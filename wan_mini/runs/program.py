"""The program around a motion-transfer method: one run from files to files, or what a run would cost."""

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
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
from wan_mini.device.flops import forward_flops
from wan_mini.device.host import fit_dtype
from wan_mini.device.memory import MemoryPlan, estimate, memory_table
from wan_mini.device.parallel import device_of_process, open_ranks
from wan_mini.device.select import DTYPES, attention_backend, compile_blocks, describe, pick_attention, pick_dtype
from wan_mini.device.timing import StageTimer
from wan_mini.errors import UserError
from wan_mini.load import Wan, build_from_folder, build_preset, load_vae, load_wan
from wan_mini.pipeline import SamplingConfig, Transfer, decode
from wan_mini.runs.folder import Panel, load_tensors, save_tensors, write_record, write_result
from wan_mini.runs.jobs import run_jobs
from wan_mini.runs.provenance import sha256_clip, versions
from wan_mini.runs.request import Method, Request, apply_flags, build_parser, load_preset, request_of
from wan_mini.tiny import demo
from wan_mini.video import read_video

FLOWS = ("flow_reference", "flow_result")  # their names beside the latents
ARROW_TILE = (3, 4)  # tokens, rows and columns that share an arrow of the preview


def program(method: Method, argv: list[str] | None) -> int:
    """Parse, then finish an old run, print a new one's costs, do it, or do many; returns 1 if one of many failed."""
    parser = build_parser(method)
    args = parser.parse_args(argv)
    device = device_of_process(args.device)
    loader = Loader()
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
        key = (request.model, home, request.dtype, request.compile, on_demand)
        if self.wan is None or self.key != key:
            self.wan = load_wan(model, device=home, dtype=request.dtype, on_demand=on_demand)
            self.key = key
            if request.compile:
                compile_blocks(self.wan.dit)
        return self.wan


def start(method: Method, args: Namespace, device: torch.device, ranks: OneProcess, loader: Loader) -> None:
    """What the command line asks for, in one of the processes of a run."""
    dtype = pick_dtype(device, args.dtype)
    if args.decode:
        finish(args.decode, device, args.png)
        return
    timer = StageTimer(device)
    with timer("plan"):
        name, parts, checkpoint = open_model(args.model)
        clip, config = load_preset(preset_folder(args.model, name), method.config)
        clip, config = apply_flags(args, clip, config)
        if not args.dry_run:
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


def execute(method: Method, request: Request, load: Callable[[], Wan], timer: StageTimer, ranks: OneProcess) -> None:
    """Do one run with the model that `load` gives. What can fail cheaply comes first; the latents are saved first."""
    with timer("read"):
        clip, frames = read_reference(request)
    with timer("load"):
        wan = load()
        ranks.share(wan.dit)
    settings = settings_of(request, clip, frames)
    size = f"{len(frames)} frames of {clip.width}x{clip.height}"
    print(f"{wan.name} on {compute_line(request)}, seed {request.seed}, {size} to {request.folder}")

    def save(result: Transfer) -> None:
        if not ranks.writes:
            return
        tensors = {"latents": result.latents, **dict(zip(FLOWS, result.flows, strict=True))}
        save_tensors(request.folder / "latents.safetensors", tensors, settings)
        record = {**settings, "stages": timer.table, **result.report, **machine(request, wan)}
        write_record(request.folder / "run.json", record)

    options = {
        "seed": request.seed,
        "device": request.device,
        "offload_blocks": request.offload == "blocks",
        "recompute": request.recompute,
    }
    with attention_backend(pick_attention(request.device)):
        result = method.transfer(wan, frames, request.prompt, request.config, timer=timer, on_latents=save, **options)
        panels = {"reference": (frames, result.flows[0]), "result": (shown(result), result.flows[1])}
        if request.unguided and request.config != method.unguided(request.config):
            with timer("unguided"):
                plain = method.transfer(wan, frames, request.prompt, method.unguided(request.config), **options)
            panels["without guidance"] = shown(plain), plain.flows[1]
    if not ranks.writes:
        return
    with timer("write"):
        files = write_result(request.folder, panels, settings, tile=ARROW_TILE, png=request.png)
    save(result)  # again, with all costs
    print("wrote", ", ".join(str(file) for file in files))
    print_summary(request, timer, result, panels)


def read_reference(request: Request) -> tuple[ClipConfig, np.ndarray]:
    """The reference's frames (T,H,W,3) uint8, and its size, which is shorter if the file is."""
    clip = request.clip
    frames = read_video(request.ref, size=(clip.height, clip.width), frames=clip.frames, fps=clip.fps)
    if len(frames) < clip.frames:
        print(f"note: {request.ref} is shorter than {clip.frames} frames, so {len(frames)} are used")
    return ClipConfig(clip.height, clip.width, len(frames), clip.fps), frames


def settings_of(request: Request, clip: ClipConfig, frames: np.ndarray) -> dict[str, Any]:
    """What a result depends on: kept beside the latents, in run.json and in every file's metadata."""
    return {
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
        "compile": request.compile,
        "parallel": wan.dit.ranks.name,
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


def finish(latents: Path, device: torch.device, png: bool) -> None:
    """Decode the latents of a run that stopped there, and write its result beside them."""
    (x, *flows), settings = load_tensors(latents, ["latents", *FLOWS])
    clip = ClipConfig(**settings["clip"])
    frames = read_video(settings["ref"], size=(clip.height, clip.width), frames=clip.frames, fps=clip.fps)
    if sha256_clip(frames) != settings["ref_sha256"]:
        raise UserError(f"{settings['ref']} has changed since the run: put the old clip back")
    vae = load_vae(settings["model"], device=device, dtype=torch.float32)
    tile = settings["config"]["vae_tile"]
    dtype = DTYPES[settings["dtype"].removeprefix("torch.")]
    result = decode(vae, x, tile=tile, dtype=dtype)
    panels = {"reference": (frames, flows[0]), "result": (result, flows[1])}
    files = write_result(latents.parent, panels, settings, tile=ARROW_TILE, png=png)
    print("wrote", ", ".join(str(file) for file in files))
