"""Plain text-to-video with Wan 2.1, no motion transfer.

python -m wan_mini.generate --model Wan2.1-T2V-1.3B --prompt "a red kite over the sea"
"""

if __name__ == "__main__":
    from wan_mini.runs.interrupt import end_quietly

    end_quietly()

import math
import shlex
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_mini.config import ClipConfig, latent_shape, valid_frames, valid_size
from wan_mini.device.offload import on_device
from wan_mini.device.select import (
    DTYPES,
    attention_backend,
    compile_blocks,
    describe,
    pick_attention,
    pick_device,
    pick_dtype,
)
from wan_mini.device.timing import StageTimer
from wan_mini.errors import MissingFile, UserError
from wan_mini.load import Wan, load_wan
from wan_mini.lora_files import add_lora_flag, parse_loras
from wan_mini.pipeline import check_vae_tile, decode, denoise
from wan_mini.prompts import NEGATIVE, encode_prompts
from wan_mini.runs.cli import (
    Parser,
    add_common_flags,
    advise,
    field_names,
    new_path,
    refuse_flags,
    run,
    seed_number,
    with_options,
)
from wan_mini.runs.finish import decode_saved, read_saved
from wan_mini.runs.folder import check_room, load_tensors, public_label, save_latents
from wan_mini.runs.generation import PROGRAM, SAMPLERS, GenerateConfig, Order, order_of, preset
from wan_mini.runs.journal import Journal
from wan_mini.runs.label import add_label_flag, label_box, with_label
from wan_mini.runs.provenance import package_version, versions
from wan_mini.runs.report import write_report
from wan_mini.runs.reserved import LATENTS, OUTPUTS, STATE, reserved, state_file
from wan_mini.scheduler import FlowEuler, FlowUniPC
from wan_mini.video import write_video


@torch.no_grad()
def generate(
    wan: Wan,
    prompt: str,
    *,
    size: tuple[int, int],
    frames: int,
    scheduler: FlowEuler | FlowUniPC,
    cfg: float,
    seed: int,
    negative: str = NEGATIVE,
    key: str = "",
    device: torch.device | None = None,
    journal: Journal | None = None,
) -> Tensor:
    """Latents (1,16,F,H/8,W/8) of a video of `frames` = 4k+1 frames and size (height, width), multiples of 16.

    device: where each part works; None: where the transformer is. journal: keeps each step.
    The start noise comes from a CPU generator, so that a seed means the same on every device. Raises
    FloatingPointError if latents stop being finite.
    """
    device = wan.device if device is None else device
    text, negative_text = encode_prompts(wan, [prompt, negative], device)
    shape = latent_shape(frames, *size, wan.dit.config.in_dim)
    noise = wan.start_noise(shape, seed, key).to(device)
    with on_device(wan.dit, device):
        return denoise(wan.dit, noise, scheduler, text, negative_text, cfg, journal=journal)


def parser() -> Parser:
    """The command line."""
    clip, config = ClipConfig(), GenerateConfig()
    p = Parser(prog="python -m wan_mini.generate", description="Text to video with Wan 2.1, without motion transfer.")
    p.add_argument("--model", type=Path, required=True, help="checkpoint folder, any published layout")
    add_lora_flag(p)
    add_label_flag(p)
    p.add_argument("--prompt", help="what the video shows")
    p.add_argument("--negative", help="what the video should not show (Wan's own; empty for the tiny model)")
    p.add_argument("--out", type=new_path, default=Path("outputs/generated.mp4"), help="mp4 or webp (%(default)s)")
    p.add_argument("--height", type=int, default=clip.height, help="pixels, multiple of 16 (%(default)s)")
    p.add_argument("--width", type=int, default=clip.width, help="pixels, multiple of 16 (%(default)s)")
    p.add_argument("--frames", type=int, default=clip.frames, help="4k+1 frames at 16 a second (%(default)s)")
    p.add_argument("--steps", type=int, default=config.steps, help="%(default)s")
    p.add_argument("--sampler", choices=list(SAMPLERS), default=config.sampler, help="%(default)s")
    p.add_argument("--shift", type=float, help=f"{config.shift:g} for 1.3B, 5 for 14B")
    p.add_argument("--cfg", type=float, help=f"{config.cfg:g} for 1.3B, 5 for 14B")
    p.add_argument("--vae-tile", type=int, metavar="PIXELS", help="decode in tiles, a multiple of 32 (whole frames)")
    p.add_argument("--seed", type=seed_number, default=0, help="%(default)s")
    p.add_argument("--key", help="public text that marks the start noise as yours (none), see wan_mini.verify")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=list(DTYPES), help="of transformer and text encoder (by the hardware)")
    p.add_argument("--offload", action="store_true", help="keep only the part at work on the device")
    p.add_argument("--compile", action="store_true", help="compile the transformer's blocks (slow the first time)")
    text = "only decode what a run has saved before it failed; takes --model, --out, --vae-tile and --device"
    p.add_argument("--decode", type=Path, metavar="LATENTS", help=text)
    text = "go on with the run that was to write this video; takes --model, --device and --offload"
    p.add_argument("--resume", type=Path, metavar="VIDEO", help=text)
    add_common_flags(p, f"fastvmt-mini {package_version()}")
    return p


def program(argv: list[str] | None) -> None:
    """Parse, then decode what an old run has saved, or generate, save the latents, decode and write."""
    args = parser().parse_args(argv)
    if [args.prompt, args.decode, args.resume].count(None) != 2:
        raise UserError("give either --prompt or --decode, or --resume (see --help)")
    device = pick_device(args.device)
    if args.resume is not None:
        refuse_flags(parser(), argv, "--resume", ("resume", "model", "device", "offload"))
        resume(args, device)
    elif args.decode is not None:
        refuse_flags(parser(), argv, "--decode", ("decode", "model", "out", "vae_tile", "device"))
        check_vae_tile(args.vae_tile)
        with reserved(args.out, *OUTPUTS):
            saved = read_saved(args.decode)
            tile = saved.config.vae_tile if args.vae_tile is None else args.vae_tile
            write_files(args.out, decode_saved(saved, args.model, device, tile), saved.clip.fps, saved.settings)
    else:
        with reserved(args.out, *OUTPUTS, STATE, LATENTS):
            start(args, device)


def start(args: Namespace, device: torch.device) -> None:
    """A new run, as the command line asks for it."""
    height, width = valid_size((args.height, args.width))
    clip = ClipConfig(height, width, valid_frames(args.frames))
    if (clip.height, clip.width, clip.frames) != (args.height, args.width, args.frames):
        asked = f"{args.frames} frames of {args.width}x{args.height}"
        print(f"note: {asked} become {clip.frames} of {clip.width}x{clip.height}")
    label_box(args.label, height, width)  # refused now, not after the run
    latents = 4 * math.prod(latent_shape(clip.frames, height, width))
    check_room(args.out.parent, 2 * latents, clip.frames * height * width * 3)  # a sampler keeps as much again
    names = field_names(GenerateConfig())
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    order = Order(
        prompt=args.prompt,
        clip=clip,
        config=with_options(GenerateConfig(), given, "--set"),  # refused before the model is loaded
        seed=args.seed,
        dtype=pick_dtype(device, args.dtype),
        loras=parse_loras(args.lora, args.model),
        label=args.label,
    )
    timer = StageTimer(device)
    wan = load(args, order, device, timer)
    order = replace(order, config=with_options(preset(wan.name, args.model), given, "--set"))
    write_video_of(wan, order, args, device, args.out, timer)


def resume(args: Namespace, device: torch.device) -> None:
    """Go on with the run that was to write the video args.resume, from the state beside it."""
    state = state_file(args.resume)
    if not state.is_file():
        raise MissingFile(f"no {state}: --resume needs the --out of a run that was stopped before its video was there")
    _, settings = load_tensors(state)
    order = order_of(settings, state, args.model)
    with reserved(args.resume, *OUTPUTS, LATENTS, resumed=True):
        timer = StageTimer(device)
        write_video_of(load(args, order, device, timer), order, args, device, args.resume, timer)


def load(args: Namespace, order: Order, device: torch.device, timer: StageTimer) -> Wan:
    """The model, where it is to lie."""
    home = torch.device("cpu") if args.offload else device
    with timer("load"):
        wan = load_wan(args.model, device=home, dtype=order.dtype, loras=order.loras)
        if args.compile:
            compile_blocks(wan.dit)
    return wan


def write_video_of(wan: Wan, order: Order, args: Namespace, device: torch.device, out: Path, timer: StageTimer) -> None:
    """Generate, save the latents beside the video, decode, write. An error, or a stop, says how to go on."""
    clip, config = order.clip, order.config
    attention = pick_attention(device)
    print(f"{wan.name} on {describe(device, order.dtype, attention)}, seed {order.seed}, {clip.frames} frames")
    settings = order.settings(wan.name)
    scheduler = SAMPLERS[config.sampler](config.steps, config.shift)
    journal = Journal(state_file(out), settings, wan.hashes, sampler=scheduler)
    saved = None
    try:
        journal.begin()
        with attention_backend(attention):
            with timer("denoise"):
                latents = generate(
                    wan,
                    order.prompt,
                    size=(clip.height, clip.width),
                    frames=clip.frames,
                    scheduler=scheduler,
                    cfg=config.cfg,
                    seed=order.seed,
                    negative=config.negative,
                    key=config.key,
                    device=device,
                    journal=journal,
                )
            saved = save_latents(out.with_suffix(LATENTS), {"latents": latents}, settings)
            with timer("decode"), on_device(wan.vae, device):
                frames = decode(wan.vae, latents, tile=config.vae_tile, dtype=wan.dtype)
        more = {"stages": timer.table, "versions": versions(), "checkpoint_sha256": wan.hashes}
        write_files(out, frames, clip.fps, settings, more)
    except BaseException as error:  # also Ctrl-C
        command = f"python {PROGRAM} --model {shlex.quote(str(args.model))}"
        if saved is not None:
            decode_it = f"{command} --decode {shlex.quote(str(saved))} --out VIDEO"
            advise(error, f"the latents are safe, to decode them: {decode_it}")
        elif journal.step > 0 and journal.path.exists():
            advise(error, f"to go on: {command} --resume {shlex.quote(str(out))}")
            raise
        journal.path.unlink(missing_ok=True)
        raise
    journal.path.unlink(missing_ok=True)


def write_files(
    out: Path, frames: np.ndarray, fps: float, settings: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> None:
    """Write the video, frames (T,H,W,3) uint8, with its settings, and beside it the page that shows more of the run."""
    frames = with_label(frames, settings.get("label", ""))
    video = write_video(out, frames, fps=fps, metadata=public_label(settings))
    page = write_report(out.with_suffix(".html"), {"result": (frames, None)}, {**settings, **(more or {})})
    print("wrote", f"{video}, {page}")


if __name__ == "__main__":
    raise SystemExit(run(program))
