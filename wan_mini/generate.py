"""Plain text-to-video with Wan 2.1, no motion transfer:

python -m wan_mini.generate --model Wan2.1-T2V-1.3B --prompt "a red kite over the sea"
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wan_mini.dit import WanDiT
from wan_mini.load import Wan, load_vae, load_wan
from wan_mini.offload import resident
from wan_mini.runtime import (
    DTYPES,
    Parser,
    check_finite,
    compile_blocks,
    height_width,
    load_tensors,
    pick_device,
    pick_dtype,
    run,
    save_tensors,
)
from wan_mini.scheduler import FlowEuler, FlowUniPC
from wan_mini.tokenizer import clean_prompt
from wan_mini.vae import WanVAE
from wan_mini.video import from_model, valid_frames, valid_size, write_video

# The original's default (wan/configs/shared_config.py), what a video should not look like: garish colors, static,
# overexposed, blurred, subtitles, painting, grayish, worst quality, ugly, extra fingers, badly drawn hands and faces,
# deformed, messy background, three legs, many people in the background, walking backwards, ...
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
# Shift, cfg and negative prompt; others have 1.3B's (official README). The tiny model's is the empty prompt, which
# stood in for the captions left out in its training: Chinese is unknown tokens to it.
SAMPLING = {"Wan2.1-T2V-14B": (5.0, 5.0, NEGATIVE), "tiny": (3.0, 3.0, "")}


@torch.no_grad()
def encode_prompts(wan: Wan, prompts: list[str], device: torch.device, *, blocks: bool = True) -> list[Tensor]:
    """Text vectors of each prompt, (1, L, text_dim), cut to the prompt's own length L <= text_len.

    A prompt that is too long loses its end, not its end-of-text token; the empty prompt is that token alone.
    blocks: see offload.resident.
    """
    limit, texts = wan.dit.config.text_len, []
    with resident(wan.text_encoder, device, blocks=blocks):
        for prompt in prompts:
            ids = wan.tokenizer.encode(clean_prompt(prompt))
            if len(ids) > limit:
                print(f"note: the prompt has {len(ids)} tokens, the model reads {limit}: its end is cut off")
                ids = [*ids[: limit - 1], ids[-1]]
            batch = torch.tensor([ids], device=device)  # (1, L)
            texts.append(wan.text_encoder(batch, torch.ones_like(batch)))
    return texts


def guided_velocity(dit: WanDiT, x: Tensor, timestep: Tensor, text: Tensor, negative: Tensor, cfg: float) -> Tensor:
    """Velocity by classifier-free guidance, u + cfg (c - u): two passes, or one where cfg is 1."""
    timestep = timestep.reshape(1)
    conditional = dit(x, timestep, text)
    if cfg == 1:
        return conditional
    unconditional = dit(x, timestep, negative)
    return unconditional + cfg * (conditional - unconditional)


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


@torch.no_grad()
def decode(vae: WanVAE, latents: Tensor, device: torch.device, tile: int | None = None) -> np.ndarray:
    """Latents (1,16,F,h,w) -> frames (T,H,W,3) uint8; tile (pixels) bounds memory, see WanVAE."""
    with resident(vae, device):
        return from_model(vae.decode(latents.to(device), tile=tile, progress=partial(tqdm, desc="decode")))


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
