"""Plain text-to-video with Wan 2.1, no motion transfer:

python -m wan_mini.generate --model Wan2.1-T2V-1.3B --prompt "a red kite over the sea"
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from wan_mini.config import valid_frames, valid_size
from wan_mini.device.offload import resident
from wan_mini.device.select import DTYPES, compile_blocks, pick_device, pick_dtype
from wan_mini.load import Wan, load_vae, load_wan
from wan_mini.pipeline import check_finite, decode, guided_velocity
from wan_mini.prompts import NEGATIVE, encode_prompts
from wan_mini.runs.cli import Parser, height_width, run
from wan_mini.runs.folder import load_tensors, save_tensors
from wan_mini.scheduler import FlowEuler, FlowUniPC
from wan_mini.video import write_video

# Shift, cfg and negative prompt; others have 1.3B's (official README). The tiny model's is the empty prompt, which
# stood in for the captions left out in its training: Chinese is unknown tokens to it.
SAMPLING = {"Wan2.1-T2V-14B": (5.0, 5.0, NEGATIVE), "tiny": (3.0, 3.0, "")}


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
    device: torch.device,
) -> Tensor:
    """Latents (1,16,F,H/8,W/8) of a video of `frames` = 4k+1 frames and size (height, width), multiples of 16.

    Noise comes from a CPU generator, so that a seed means the same on every device.
    Raises FloatingPointError if latents stop being finite.
    """
    text, negative_text = encode_prompts(wan, [prompt, negative], device)
    shape = (1, wan.dit.config.in_dim, (frames - 1) // 4 + 1, size[0] // 8, size[1] // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    with resident(wan.dit, device):
        for index, timestep in enumerate(tqdm(scheduler.timesteps, desc="denoise", unit="step")):
            velocity = guided_velocity(wan.dit, x, timestep, text, negative_text, cfg)
            x = scheduler.step(index, x, velocity)
            check_finite(x, index, len(scheduler.timesteps))
    return x


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m wan_mini.generate", description="Text to video with Wan 2.1, without motion transfer.")
    p.add_argument("--model", type=Path, required=True, help="checkpoint folder, any published layout")
    p.add_argument("--prompt", help="what the video shows")
    p.add_argument("--negative", help="what it should not look like (Wan's default, tiny none)")
    p.add_argument("--out", type=Path, default=Path("outputs/generated.mp4"), help="mp4 or webp (%(default)s)")
    p.add_argument("--size", type=height_width, default=(480, 832), help="HEIGHTxWIDTH in pixels (480x832)")
    p.add_argument("--frames", type=int, default=81, help="4k+1 frames at 16 a second (%(default)s)")
    p.add_argument("--steps", type=int, default=50, help="%(default)s")
    p.add_argument("--sampler", choices=["unipc", "euler"], default="unipc", help="%(default)s")
    p.add_argument("--shift", type=float, help="8 for 1.3B, 5 for 14B")
    p.add_argument("--cfg", type=float, help="6 for 1.3B, 5 for 14B")
    p.add_argument("--seed", type=int, default=0, help="%(default)s")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=list(DTYPES), help="bfloat16 where native, else float32")
    p.add_argument("--offload", action="store_true", help="keep only the stage at work on the device")
    p.add_argument("--compile", action="store_true", help="compile the transformer's blocks (slow the first time)")
    p.add_argument("--decode", type=Path, metavar="LATENTS", help="only decode what a run has saved before it failed")
    return p


def program(argv: list[str] | None) -> None:
    """Parse, load, generate, save the latents, decode, write."""
    args = parser().parse_args(argv)
    device = pick_device(args.device)
    size, frames = valid_size(args.size), valid_frames(args.frames)
    if min(size) < 16 or frames < 1 or (args.prompt is None) == (args.decode is None):
        raise ValueError("need --prompt or --decode, --size of at least 16x16 and --frames of at least 1 (see --help)")
    if args.out.suffix not in (".mp4", ".webp") or args.out.exists():
        raise ValueError(f"--out must be a new .mp4 or .webp file, got {args.out}")
    if args.decode:
        vae = load_vae(args.model, device=device, dtype=torch.float32)
        latents, settings = load_tensors(args.decode, ["latents"])
        print("wrote", write_video(args.out, decode(vae, *latents, device), fps=16, metadata=settings))
        return
    if (size, frames) != (args.size, args.frames):
        print(f"note: {args.frames} frames of {args.size[0]}x{args.size[1]} become {frames} of {size[0]}x{size[1]}")
    wan = load_wan(args.model, device="cpu" if args.offload else device, dtype=pick_dtype(device, args.dtype))
    if args.compile:
        compile_blocks(wan.dit)
    given = args.shift, args.cfg, args.negative
    own = SAMPLING.get(wan.name, (8.0, 6.0, NEGATIVE))
    shift, cfg, negative = (b if a is None else a for a, b in zip(given, own))
    scheduler = (FlowUniPC if args.sampler == "unipc" else FlowEuler)(args.steps, shift)
    settings = {"seed": args.seed, "sampler": args.sampler, "steps": args.steps, "shift": shift, "cfg": cfg}
    print(f"{wan.name} on {device}: {frames} frames of {size[0]}x{size[1]},", json.dumps(settings))
    options = {"size": size, "frames": frames, "scheduler": scheduler, "cfg": cfg, "seed": args.seed}
    latents = generate(wan, args.prompt, **options, negative=negative, device=device)
    settings |= {"ai_generated": True, "model": wan.name, "prompt": args.prompt, "negative": negative}
    save_tensors(args.out.with_suffix(".safetensors"), {"latents": latents}, settings)
    print("wrote", write_video(args.out, decode(wan.vae, latents, device), fps=16, metadata=settings))


if __name__ == "__main__":
    raise SystemExit(run(program))
