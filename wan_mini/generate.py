"""Plain text-to-video with Wan 2.1, no motion transfer.

python -m wan_mini.generate --model Wan2.1-T2V-1.3B --prompt "a red kite over the sea"
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from wan_mini.errors import UserError
from wan_mini.load import Wan, load_vae, load_wan
from wan_mini.pipeline import decode, denoise
from wan_mini.prompts import NEGATIVE, encode_prompts
from wan_mini.runs.cli import Parser, add_common_flags, field_names, run, with_options
from wan_mini.runs.folder import load_tensors, read_preset, save_tensors
from wan_mini.runs.provenance import package_version
from wan_mini.scheduler import FlowEuler, FlowUniPC
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
    device: torch.device | None = None,
) -> Tensor:
    """Latents (1,16,F,H/8,W/8) of a video of `frames` = 4k+1 frames and size (height, width), multiples of 16.

    device: where each part works; None: where the transformer is. The start noise comes from a CPU generator, so that
    a seed means the same on every device. Raises FloatingPointError if latents stop being finite.
    """
    device = wan.device if device is None else device
    text, negative_text = encode_prompts(wan, [prompt, negative], device)
    shape = latent_shape(frames, *size, wan.dit.config.in_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    with on_device(wan.dit, device):
        return denoise(wan.dit, noise, scheduler, text, negative_text, cfg)


def parser() -> Parser:
    """The command line."""
    clip, config = ClipConfig(), GenerateConfig()
    p = Parser(prog="python -m wan_mini.generate", description="Text to video with Wan 2.1, without motion transfer.")
    p.add_argument("--model", type=Path, required=True, help="checkpoint folder, any published layout")
    p.add_argument("--prompt", help="what the video shows")
    p.add_argument("--negative", help="what it should not look like (Wan's default; the tiny model's is empty)")
    p.add_argument("--out", type=Path, default=Path("outputs/generated.mp4"), help="mp4 or webp (%(default)s)")
    p.add_argument("--height", type=int, default=clip.height, help="pixels, multiple of 16 (%(default)s)")
    p.add_argument("--width", type=int, default=clip.width, help="pixels, multiple of 16 (%(default)s)")
    p.add_argument("--frames", type=int, default=clip.frames, help="4k+1 frames at 16 a second (%(default)s)")
    p.add_argument("--steps", type=int, default=config.steps, help="%(default)s")
    p.add_argument("--sampler", choices=list(SAMPLERS), default=config.sampler, help="%(default)s")
    p.add_argument("--shift", type=float, help=f"{config.shift:g} for 1.3B, 5 for 14B")
    p.add_argument("--cfg", type=float, help=f"{config.cfg:g} for 1.3B, 5 for 14B")
    p.add_argument("--seed", type=int, default=0, help="%(default)s")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=list(DTYPES), help="of transformer and text encoder (by the hardware)")
    p.add_argument("--offload", action="store_true", help="keep only the part at work on the device")
    p.add_argument("--compile", action="store_true", help="compile the transformer's blocks (slow the first time)")
    p.add_argument("--decode", type=Path, metavar="LATENTS", help="only decode what a run has saved before it failed")
    add_common_flags(p, f"fastvmt-mini {package_version()}")
    return p


def check_output(out: Path, *suffixes: str) -> None:
    """Raises UserError unless the output is a video, and new with each of these suffixes."""
    if out.suffix not in (".mp4", ".webp"):
        raise UserError(f"--out must end in .mp4 or .webp, got {out}")
    for suffix in suffixes:
        file = out.with_suffix(suffix)
        if file.exists():
            raise UserError(f"{file} exists already: choose another --out")


def program(argv: list[str] | None) -> None:
    """Parse, then decode what an old run has saved, or generate, save the latents, decode and write."""
    args = parser().parse_args(argv)
    if (args.prompt is None) == (args.decode is None):
        raise UserError("give either --prompt or --decode (see --help)")
    device = pick_device(args.device)
    if args.decode:
        check_output(args.out, ".mp4", ".webp")  # without ffmpeg, an mp4 becomes a webp
        vae = load_vae(args.model, device=device, dtype=torch.float32)
        (latents,), settings = load_tensors(args.decode, ["latents"])
        frames = decode(vae, latents, dtype=DTYPES[settings["dtype"]])
        print("wrote", write_video(args.out, frames, fps=settings["fps"], metadata=settings))
        return
    check_output(args.out, ".mp4", ".webp", ".safetensors")
    height, width = valid_size((args.height, args.width))
    clip = ClipConfig(height, width, valid_frames(args.frames))
    if (clip.height, clip.width, clip.frames) != (args.height, args.width, args.frames):
        asked = f"{args.frames} frames of {args.width}x{args.height}"
        print(f"note: {asked} become {clip.frames} of {clip.width}x{clip.height}")
    dtype = pick_dtype(device, args.dtype)
    home = torch.device("cpu") if args.offload else device
    wan = load_wan(args.model, device=home, dtype=dtype)
    if args.compile:
        compile_blocks(wan.dit)
    names = field_names(GenerateConfig())
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = with_options(preset(wan.name, args.model), given, "--set")
    attention = pick_attention(device)
    print(f"{wan.name} on {describe(device, dtype, attention)}, seed {args.seed}, {clip.frames} frames")
    with attention_backend(attention):
        write_new_video(wan, args.prompt, clip, config, args.seed, device, args.out)


def write_new_video(
    wan: Wan, prompt: str, clip: ClipConfig, config: GenerateConfig, seed: int, device: torch.device, out: Path
) -> None:
    """Generate, save the latents beside the video, decode, write."""
    scheduler = SAMPLERS[config.sampler](config.steps, config.shift)
    latents = generate(
        wan,
        prompt,
        size=(clip.height, clip.width),
        frames=clip.frames,
        scheduler=scheduler,
        cfg=config.cfg,
        seed=seed,
        negative=config.negative,
        device=device,
    )
    settings: dict[str, Any] = {"ai_generated": True, "model": wan.name, "prompt": prompt, "seed": seed}
    settings |= {"dtype": str(wan.dtype).removeprefix("torch."), **asdict(config), **asdict(clip)}
    save_tensors(out.with_suffix(".safetensors"), {"latents": latents}, settings)
    with on_device(wan.vae, device):
        frames = decode(wan.vae, latents, dtype=wan.dtype)
    print("wrote", write_video(out, frames, fps=clip.fps, metadata=settings))


if __name__ == "__main__":
    raise SystemExit(run(program))
