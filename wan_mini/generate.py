"""Plain text-to-video with Wan 2.1, no motion transfer.

python -m wan_mini.generate --model Wan2.1-T2V-1.3B --prompt "a red kite over the sea"
"""

if __name__ == "__main__":
    from wan_mini.runs.interrupt import end_quietly

    end_quietly()

import math
import shlex
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from wan_mini.errors import UserError, check_positive, check_range
from wan_mini.experts import A14B
from wan_mini.files import Unwritable
from wan_mini.load import Wan, load_wan
from wan_mini.lora_files import LoraFile, add_lora_flag, parse_loras
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
from wan_mini.runs.folder import check_room, public_label, read_preset, save_latents
from wan_mini.runs.label import add_label_flag, with_label
from wan_mini.runs.provenance import GENERATED, package_version, versions
from wan_mini.runs.report import write_report
from wan_mini.scheduler import MAX_STEPS, FlowEuler, FlowUniPC
from wan_mini.video import write_video

SAMPLERS = {"unipc": FlowUniPC, "euler": FlowEuler}


@dataclass(frozen=True)
class GenerateConfig:
    """The options of text-to-video; defaults are the official README's for 1.3B."""

    steps: int = 50
    sampler: str = "unipc"
    shift: float = 8.0  # of the noise levels; 5 for 14B
    cfg: float = 6.0  # scale of classifier-free guidance; 5 for 14B
    negative: str = NEGATIVE  # prompt that classifier-free guidance leads away from
    vae_tile: int | None = None  # pixels, multiple of 32: decode in tiles, less memory, not quite the same
    key: str = ""  # of the start noise, public text (noise.py); "": none

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, MAX_STEPS)
        check_positive("shift", self.shift)
        check_range("cfg", self.cfg)
        check_vae_tile(self.vae_tile)


def preset(name: str, folder: Path) -> GenerateConfig:
    """The options that suit a model: its checkpoint's own (motion.json), else the official README's."""
    motion = read_preset(folder).get("motion", {})
    own: dict[str, Any] = {}
    for option in ("shift", "cfg", "negative"):
        if option in motion:
            own[option] = motion[option]
    published = GenerateConfig()
    if name == "Wan2.1-T2V-14B":
        published = GenerateConfig(shift=5.0, cfg=5.0)
    if name == A14B:
        published = GenerateConfig(shift=12.0, cfg=4.0)  # officially 3 below the boundary
    return with_options(published, own, f"{folder}/motion.json: motion")


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
) -> Tensor:
    """Latents (1,16,F,H/8,W/8) of a video of `frames` = 4k+1 frames and size (height, width), multiples of 16.

    device: where each part works; None: where the transformer is. The start noise comes from a CPU generator, so that
    a seed means the same on every device. Raises FloatingPointError if latents stop being finite.
    """
    device = wan.device if device is None else device
    text, negative_text = encode_prompts(wan, [prompt, negative], device)
    shape = latent_shape(frames, *size, wan.dit.config.in_dim)
    noise = wan.start_noise(shape, seed, key).to(device)
    with on_device(wan.dit, device):
        return denoise(wan.dit, noise, scheduler, text, negative_text, cfg)


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
    add_common_flags(p, f"fastvmt-mini {package_version()}")
    return p


@contextmanager
def reserved(out: Path, *suffixes: str) -> Iterator[None]:
    """Take the output's name with each of these suffixes, so that no other run can; the last one by an empty file.

    What is still empty after an error is removed. Raises UserError unless the output is a video, and new; Unwritable,
    before anything is computed, if nothing can be written there.
    """
    if out.suffix not in (".mp4", ".webp"):
        raise UserError(f"--out must end in .mp4 or .webp, got {out}")
    for suffix in suffixes:
        file = out.with_suffix(suffix)
        if file.exists():
            raise UserError(f"{file} exists already: choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file.touch(exist_ok=False)
    except FileExistsError:
        raise UserError(f"{out.parent} is no folder, or {file} exists already: choose another --out") from None
    except OSError as error:
        raise Unwritable(f"cannot write into {out.parent} ({error.strerror}): choose another --out") from None
    try:
        yield
    finally:
        if file.exists() and file.stat().st_size == 0:
            file.unlink()


def program(argv: list[str] | None) -> None:
    """Parse, then decode what an old run has saved, or generate, save the latents, decode and write."""
    args = parser().parse_args(argv)
    if (args.prompt is None) == (args.decode is None):
        raise UserError("give either --prompt or --decode (see --help)")
    device = pick_device(args.device)
    if args.decode is None:
        with reserved(args.out, ".mp4", ".webp", ".html", ".safetensors"):
            generate_to_file(args, device)
        return
    refuse_flags(parser(), argv, "--decode", ("decode", "model", "out", "vae_tile", "device"))
    check_vae_tile(args.vae_tile)
    with reserved(args.out, ".mp4", ".webp", ".html"):  # without ffmpeg, an mp4 becomes a webp
        saved = read_saved(args.decode)
        tile = saved.config.vae_tile if args.vae_tile is None else args.vae_tile
        write_files(args.out, decode_saved(saved, args.model, device, tile), saved.clip.fps, saved.settings)


def generate_to_file(args: Namespace, device: torch.device) -> None:
    """Load the model, generate, save the latents beside the video, decode, write."""
    height, width = valid_size((args.height, args.width))
    clip = ClipConfig(height, width, valid_frames(args.frames))
    if (clip.height, clip.width, clip.frames) != (args.height, args.width, args.frames):
        asked = f"{args.frames} frames of {args.width}x{args.height}"
        print(f"note: {asked} become {clip.frames} of {clip.width}x{clip.height}")
    check_room(
        args.out.parent, 4 * math.prod(latent_shape(clip.frames, height, width)), clip.frames * height * width * 3
    )
    loras = parse_loras(args.lora, args.model)
    names = field_names(GenerateConfig())
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with_options(GenerateConfig(), given, "--set")  # refused before the model is loaded
    timer = StageTimer(device)
    dtype = pick_dtype(device, args.dtype)
    home = torch.device("cpu") if args.offload else device
    with timer("load"):
        wan = load_wan(args.model, device=home, dtype=dtype, loras=loras)
        if args.compile:
            compile_blocks(wan.dit)
    config = with_options(preset(wan.name, args.model), given, "--set")
    attention = pick_attention(device)
    print(f"{wan.name} on {describe(device, dtype, attention)}, seed {args.seed}, {clip.frames} frames")
    with attention_backend(attention):
        write_new_video(wan, args.prompt, clip, config, args.seed, device, args.out, timer, loras, args.label)


def write_new_video(
    wan: Wan,
    prompt: str,
    clip: ClipConfig,
    config: GenerateConfig,
    seed: int,
    device: torch.device,
    out: Path,
    timer: StageTimer,
    loras: Sequence[LoraFile] = (),
    label: str = "",
) -> None:
    """Generate, save the latents beside the video, decode, write."""
    scheduler = SAMPLERS[config.sampler](config.steps, config.shift)
    with timer("denoise"):
        latents = generate(
            wan,
            prompt,
            size=(clip.height, clip.width),
            frames=clip.frames,
            scheduler=scheduler,
            cfg=config.cfg,
            seed=seed,
            negative=config.negative,
            key=config.key,
            device=device,
        )
    settings: dict[str, Any] = {**GENERATED, "program": "-m wan_mini.generate", "model": wan.name}
    settings |= {"prompt": prompt, "seed": seed, "dtype": str(wan.dtype).removeprefix("torch.")}
    settings |= {**asdict(config), **asdict(clip), "loras": [str(lora) for lora in loras], "label": label}
    saved = save_latents(out.with_suffix(".safetensors"), {"latents": latents}, settings)
    try:
        with timer("decode"), on_device(wan.vae, device):
            frames = decode(wan.vae, latents, tile=config.vae_tile, dtype=wan.dtype)
        more = {"stages": timer.table, "versions": versions(), "checkpoint_sha256": wan.hashes}
        write_files(out, frames, clip.fps, settings, more)
    except BaseException as error:
        command = f"python -m wan_mini.generate --model MODEL --decode {shlex.quote(str(saved))} --out VIDEO"
        advise(error, f"the latents are safe, to decode them: {command}")
        raise


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
