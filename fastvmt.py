"""FastVMT: a new video that shows a prompt with the motion of a reference clip, without training (arXiv 2602.05551).

    python fastvmt.py                                                  # tiny model and bundled clip
    python fastvmt.py --model Wan2.1-T2V-1.3B --ref clip.mp4 --prompt "a fox runs over a frozen lake"

The queries and keys of one block of the diffusion transformer tell where each token goes from frame to frame: the
Attention Motion Flow (window.py). In the first steps of denoising, the latent is optimized (skip_optim.py) until its
flow matches the reference's (losses.py). Below, `transfer` is the run, and `Guide` what is minimized.
"""

import json
import math
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from losses import amf_loss, total_loss, window_loss
from skip_optim import optimize
from wan_mini.device.flops import activation_bytes, forward_flops, gradient_flops
from wan_mini.device.memory import Plan, as_loaded, choose, free_memory, plans
from wan_mini.device.offload import OFFLOAD, resident
from wan_mini.device.select import DTYPES, compile_blocks, pick_device, pick_dtype
from wan_mini.device.timing import StageTimer
from wan_mini.dit import RECOMPUTE, WanDiT
from wan_mini.load import Wan, build_modules, load_vae, load_wan
from wan_mini.pipeline import check_finite, decode, guided_velocity
from wan_mini.prompts import NEGATIVE, encode_prompts
from wan_mini.runs.cli import Parser, height_width, parse_options, run
from wan_mini.runs.folder import check_new_folder, load_tensors, save_tensors
from wan_mini.runs.preview import side_by_side, with_arrows
from wan_mini.runs.provenance import checkpoint_hashes, versions
from wan_mini.scheduler import FlowEuler
from wan_mini.tiny import demo
from wan_mini.video import read_video, to_model, valid_frames, valid_size, write_video
from window import dense_amf, frame_pairs, tile_centers, windowed_amf

FLOWS = ("flow_reference", "flow_result")  # as they are named beside the latents


@dataclass(frozen=True)
class MotionConfig:
    """Every knob of a transfer. Sec. and Eq. are the paper's; "release" is its code, mayuelala/FastVMT at 34a050b."""

    height: int = 480  # pixels, multiple of 16 (Sec. 4.1)
    width: int = 832
    frames: int = 81  # 4k+1 (Sec. 4.1)
    fps: float = 16.0  # Wan 2.1's rate; the reference is resampled to it
    steps: int = 50  # denoising steps (Sec. 4.1)
    shift: float = 7.0  # release; the paper does not say
    cfg: float = 5.8  # release; the paper does not say
    negative: str = NEGATIVE  # Wan's default: what the video should not look like
    strength: float = 1.0  # 1: start from Gaussian noise (paper); below: from the noised reference (release: 0.75)
    amf: str = "windowed"  # "windowed" (FastVMT), "dense" (all pairs of tokens), "none" (no guidance)
    guided: float = 0.2  # first share of the steps that is guided (Sec. 4.1)
    inner_steps: int = 10  # latent updates per guided step (Sec. 4.1)
    interval: int = 3  # a gradient every so many updates (Eq. 9; release: 3)
    lr: tuple[float, float] = (0.003, 0.002)  # AdamW's rate at the first and the last of these updates (Sec. 4.1)
    block: int | None = None  # whose q and k; None: the middle one, 14 of 30 (Fig. 7, "15th block")
    tau: float = 2.0  # factor of the heads' mean logits (DiTFlow's; the release's belongs to other logits)
    tile: tuple[int, int] = (3, 4)  # tokens, rows and columns (release)
    window: int = 21  # tokens, side of the square window (release)
    span: int = 4  # largest distance of a frame pair (release, corrected: there the largest is 3)
    alpha: float = 0.2  # how much less the farthest pair weighs (Eq. 6)
    weights: tuple[float, float] = (5.0, 1.0)  # of AMF loss and window loss (Eq. 8)
    # Around which matches the windows lie. "ref0": the clean reference's, once per run, for both videos. "ref": the
    # noised reference's, for both. "own": each video's own, anew at every gradient (release); near pure noise these
    # are almost random, so a prototype on a small trained Wan followed its reference far better with ref0 (README).
    centers: str = "ref0"
    # Whose flow is wanted. "noised": that of the reference with the step's noise (Sec. 4.1, release); "clean": without
    # noise, once per run (Sec. 3.2; "ref" is then "ref0"). A flow read near pure noise says little of the reference,
    # but a clean one asks of a noisy latent what its own flow may not be able to show.
    reference: str = "noised"
    center_kind: str = "argmax"  # the best match (Eq. 4); "soft": the mean over all (Eq. 2; release)
    vae_tile: int | None = None  # pixels, multiple of 32: encode and decode in tiles, less memory, not quite the same

    def __post_init__(self):
        choices = {
            "amf": ("windowed", "dense", "none"),
            "centers": ("ref0", "ref", "own"),
            "reference": ("noised", "clean"),
            "center_kind": ("argmax", "soft"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)}")
        least = {"height": 16, "width": 16, "frames": 5, "steps": 1, "inner_steps": 1, "interval": 1, "tile": 1}
        least |= {"window": 1, "span": 1}  # others: 0
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if isinstance(n, (int, float))]
            if not all(math.isfinite(n) and n >= least.get(f.name, 0) for n in numbers):
                raise ValueError(f"{f.name} must be at least {least.get(f.name, 0)} and finite, got {value}")
        for name in ("fps", "shift", "tau", "strength"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0, got 0")
        for name in ("guided", "strength", "alpha"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)}")

    @property
    def guided_steps(self) -> int:
        """Number of guided denoising steps."""
        share = round(self.guided * self.steps, 6)  # 0.2 * 15 is a little more than 3
        return 0 if self.amf == "none" else math.ceil(share)

    def block_of(self, dit: WanDiT) -> int:
        """The block whose queries and keys are read; by default 14 of 30, and the middle one of other depths."""
        count = dit.config.num_layers
        block = (count - 1) // 2 if self.block is None else self.block
        if not 0 <= block < count:
            raise ValueError(f"block must be in 0..{count - 1}, got {block}")
        return block


# For the tiny model, whose grid is 9 latent frames of 8x12 tokens: a small window, pairs of all distances, fewer
# steps, and guidance for longer, with larger updates than the paper's, towards the clean reference's flow. Block and
# tau are those that its training taught to match, shift, cfg and negative prompt those that it was trained to be
# sampled with; guided, lr, reference, span and window were chosen on training clips (README).
TINY_MOTION = MotionConfig(
    height=128,
    width=192,
    frames=33,
    steps=25,
    shift=3.0,
    cfg=3.0,
    negative="",
    guided=0.6,
    lr=(0.01, 0.007),
    block=3,
    tau=3.0,
    window=5,
    span=8,
    reference="clean",
)


@dataclass
class Transfer:
    """What a run gives: final latents (1,16,F,h,w) float32, both clips' flows, a report, frames (T,H,W,3) uint8."""

    latents: Tensor
    flows: tuple[Tensor, Tensor]  # (F-1, S, 2) from each latent frame to the next: reference, result
    report: dict[str, Any]
    frames: np.ndarray | None = None  # None until they are decoded


@torch.no_grad()
def transfer(
    wan: Wan,
    clip: np.ndarray,
    prompt: str,
    config: MotionConfig,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    blocks: bool = True,
    recompute: str | None = None,
    on_latents: Callable[[Transfer], None] = lambda result: None,
) -> Transfer:
    """Generate a video of `prompt` that moves like `clip`.

    clip (T,H,W,3) uint8, T = 4k+1, H and W multiples of 16; each part of `wan` is on `device` while it works;
    blocks=False: of transformer and text encoder only the blocks at work (offload.py). recompute: one of dit.RECOMPUTE,
    None for the least that fits.
    on_latents gets the result before it is decoded, so that a failure there loses nothing.
    Raises ValueError on sizes that do not fit, FloatingPointError if latents stop being finite.
    """
    device = torch.device(device)
    stage = StageTimer(device)
    with stage("text"):
        prompts = [prompt, config.negative, ""]  # the last is no text at all
        text, negative_text, null = encode_prompts(wan, prompts, device, blocks=blocks)
    with stage("encode"), resident(wan.vae, device):
        bar = partial(tqdm, desc="encode")
        z_ref = wan.vae.encode(to_model(clip).to(device), tile=config.vae_tile, progress=bar)
    noise = torch.randn(z_ref.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    scheduler = FlowEuler(config.steps, config.shift, config.strength)

    def noised_reference(sigma: Tensor) -> Tensor:
        return (1 - sigma) * z_ref + sigma * noise  # the same noise as the start's

    x = noised_reference(scheduler.sigmas[0])  # sigma is 1 there, pure noise, unless strength < 1
    losses = []
    bar = tqdm(total=config.steps, desc="denoise", unit="step")
    with resident(wan.dit, device, blocks=blocks), bar:
        with stage("guide"):
            guide = Guide(wan.dit, z_ref, text, null, config, recompute)
        for index, (sigma, timestep) in enumerate(zip(scheduler.sigmas, scheduler.timesteps)):
            if index < config.guided_steps:
                with stage("guide"):
                    loss = guide.loss_at(timestep, noised_reference(sigma), show=bar.set_postfix)
                    x, inner = optimize(x, loss, steps=config.inner_steps, interval=config.interval, lr=config.lr)
                    losses.append(inner.losses)
            with stage("denoise"):
                velocity = guided_velocity(wan.dit, x, timestep, text, negative_text, config.cfg)
                x = scheduler.step(index, x, velocity)
            check_finite(x, index, config.steps)
            bar.update()
        with stage("flows"):
            flows = guide.clean_flow(z_ref), guide.clean_flow(x)
    report = {"stages": stage.table, "losses": losses, "gradients": sum(map(len, losses)), **guide.report}
    result = Transfer(x, flows, report)
    on_latents(result)
    with stage("decode"):
        result.frames = decode(wan.vae, x, device, config.vae_tile)
    return result


class Guide:
    """The motion of a reference clip, and the loss that pulls a latent towards it.

    The reference is read without its text (null), the result with its prompt. Both carry the same noise, so that what
    is compared at each step is how two equally noisy latents move; unless the reference is taken clean.
    """

    def __init__(
        self,
        dit: WanDiT,
        z_ref: Tensor,
        text: Tensor,
        null: Tensor,
        config: MotionConfig,
        recompute: str | None = None,
    ):
        self.dit, self.text, self.null, self.config = dit, text, null, config
        self.grid = dit.grid(z_ref)
        self.pairs = frame_pairs(self.grid[0], config.span)
        self.block = config.block_of(dit)
        self.recompute = recompute or choose_recompute(dit, self.grid, self.block, z_ref.device)
        self.report = {"pairs": len(self.pairs), "recompute": self.recompute, "key_gradient_norms": []}
        self.centers = self.clean = None  # what is found once; None: anew, at each step or at each gradient
        ref0 = config.amf == "windowed" and config.centers == "ref0"
        clean = config.amf != "none" and config.reference == "clean"
        if ref0 or clean:
            q, k = self.qk(z_ref, torch.zeros(1), null)  # t = 0
            self.centers = self.centers_of(q, k) if ref0 else None
            self.clean = self.wanted(q, k) if clean else None

    def qk(self, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of the block, (1,N,M,D) each."""
        again = self.recompute if x.requires_grad else "none"
        return self.dit(x, timestep.reshape(1), text, qk_block=self.block, recompute=again)

    def centers_of(self, q: Tensor, k: Tensor) -> Tensor:
        """Where each tile went, (pairs, tiles, 2)."""
        c = self.config
        return tile_centers(q, k, self.grid, self.pairs, tile=c.tile, kind=c.center_kind, tau=c.tau)

    def flow(self, q: Tensor, k: Tensor, centers: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Motion flow (pairs, S, 2), and its windows if it has any."""
        c = self.config
        if c.amf == "dense":
            return dense_amf(q, k, self.grid, self.pairs, tau=c.tau), None
        centers = self.centers_of(q, k) if centers is None else centers
        return windowed_amf(q, k, self.grid, self.pairs, tau=c.tau, tile=c.tile, window=c.window, centers=centers)

    def wanted(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Flow of the reference (pairs, S, 2), and the centers for both videos; None where each has its own."""
        fresh = self.config.amf == "windowed" and self.config.centers == "ref"
        centers = self.centers_of(q, k) if fresh else self.centers
        return self.flow(q, k, centers)[0], centers

    def losses(self, q: Tensor, k: Tensor, flow_ref: Tensor, centers: Tensor | None) -> tuple[Tensor, Tensor]:
        """Flow loss (Eq. 5) and window loss (Eq. 7; 0 for dense flow, which has no windows)."""
        flow, windows = self.flow(q, k, centers)
        amf = amf_loss(flow_ref, flow, self.pairs, self.config.span, self.config.alpha)
        return amf, k.new_zeros(()) if windows is None else window_loss(k, self.grid, self.pairs, windows)

    def loss_at(
        self, timestep: Tensor, noised_reference: Tensor, show: Callable[..., None] = lambda **losses: None
    ) -> Callable[[Tensor], Tensor]:
        """The loss of a latent at this timestep, against the reference at the same noise, or at none (Eq. 8)."""
        flow_ref, centers = self.clean or self.wanted(*self.qk(noised_reference, timestep, self.null))
        norms: dict[str, float] = {}  # noted at the first gradient of the step
        self.report["key_gradient_norms"].append(norms)

        def loss(x: Tensor) -> Tensor:
            q, k = self.qk(x, timestep, self.text)
            amf, tracking = self.losses(q, k, flow_ref, centers)
            show(amf=f"{amf.item():.4g}", window=f"{tracking.item():.4g}")
            if not norms:
                norms.update(key_gradient_norms(amf, tracking, self.config.weights, k))
            return total_loss(amf, tracking, self.config.weights)

        return loss

    def clean_flow(self, latents: Tensor) -> Tensor:
        """Flow of a clean clip from each latent frame to the next, (F-1, S, 2): the preview's arrows.

        Not the flow that was optimized, which is that of noisy latents. In windows around the clip's own matches,
        whatever guides: a mean over the frame points to its middle where a match is unsure, as on an even ground.
        """
        c, pairs = self.config, frame_pairs(self.grid[0], 1)
        q, k = self.qk(latents, torch.zeros(1), self.null)
        return windowed_amf(q, k, self.grid, pairs, tau=c.tau, tile=c.tile, window=c.window)[0]


def key_gradient_norms(amf: Tensor, window: Tensor, weights: tuple[float, float], k: Tensor) -> dict[str, float]:
    """How hard each weighted loss pulls at the keys, on which both act; to Adam only their ratio matters."""
    norms = {}
    for name, weight, loss in zip(("amf", "window"), weights, (amf, window)):
        norms[name] = 0.0
        if loss.requires_grad:  # one pair has no window loss, dense flow no windows: constants
            (gradient,) = torch.autograd.grad(weight * loss, k, retain_graph=True)
            norms[name] = gradient.norm().item()
    return norms


def choose_recompute(dit: WanDiT, grid: tuple[int, int, int], block: int, device: torch.device) -> str:
    """The first of RECOMPUTE whose activations take at most 80 % of the device's free memory, where that is known.

    Not "none" where blocks are elsewhere (offload.py): all their copies would be kept.
    """
    width, free = dit.patch_embedding.weight.element_size(), free_memory(device)
    tokens = grid[0] * grid[1] * grid[2]
    needed = {recompute: activation_bytes(dit.config, tokens, block, width, recompute) for recompute in RECOMPUTE}
    ways = RECOMPUTE if any(True for _ in dit.blocks.parameters()) else RECOMPUTE[1:]
    return next((way for way in ways if free is None or needed[way] <= 0.8 * free), RECOMPUTE[-1])


def one_gradient(dit: WanDiT, z: Tensor, text: Tensor, recompute: str, config: MotionConfig) -> None:
    """A gradient of the guidance as far as memory is concerned, on tensors that may have no contents."""
    guide = Guide(dit, z, text, text, config, recompute)
    x = z.detach().requires_grad_()
    with torch.enable_grad():
        q, k = guide.qk(x, torch.tensor(500.0), text)
        wanted = q.new_zeros(len(guide.pairs), guide.grid[1] * guide.grid[2], 2)
        losses = guide.losses(q, k, wanted, guide.centers)
        torch.autograd.grad(total_loss(*losses, config.weights), x)


# The command line.


def parser() -> Parser:
    """The flags; their defaults are MotionConfig's."""
    c, t = MotionConfig(), TINY_MOTION
    p = Parser(
        prog="fastvmt.py", description="Generate a video that shows a prompt with the motion of a reference clip."
    )
    model = p.add_argument_group("model")
    model.add_argument("--model", type=Path, help="checkpoint folder, any published layout (the tiny model)")
    model.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    model.add_argument("--dtype", choices=list(DTYPES), help="of transformer and text encoder (bfloat16 where native)")
    more = "keep only the part at work on the device, or of its blocks only those at work (none; without a word: parts)"
    model.add_argument("--offload", nargs="?", const="parts", default="none", choices=OFFLOAD, help=more)
    model.add_argument("--memory", type=float, metavar="GB", help="of the GPU: chooses what to offload and recompute")
    model.add_argument("--compile", action="store_true", help="compile the transformer's blocks (slow the first time)")
    clip = p.add_argument_group("clip and prompt")
    clip.add_argument("--ref", type=Path, help="mp4, GIF, WebP or folder of pictures (a clip of the tiny world)")
    clip.add_argument("--prompt", help=f'what the new video shows ("{demo.target_scene().caption}")')
    clip.add_argument("--negative", help="what it should not look like (Wan's default, tiny none)")
    clip.add_argument("--frames", type=int, help=f"4k+1, at {c.fps:g} a second ({c.frames}, tiny {t.frames})")
    size = f"{c.height}x{c.width}, tiny {t.height}x{t.width}"
    clip.add_argument("--size", type=height_width, help=f"HEIGHTxWIDTH in pixels, multiples of 16 ({size})")
    clip.add_argument("--seed", type=int, default=0, help="of the start noise (%(default)s)")
    method = p.add_argument_group("method")
    method.add_argument("--amf", help=f"motion flow: windowed, dense or none ({c.amf})")
    method.add_argument("--interval", type=int, help=f"a gradient every so many latent updates ({c.interval})")
    method.add_argument("--steps", type=int, help=f"denoising steps ({c.steps}, tiny {t.steps})")
    knobs = "any knob of MotionConfig (what each does stands there), pairs as lr=0.003,0.002: "
    knobs += ", ".join(f.name for f in fields(c))
    method.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=knobs)
    output = p.add_argument_group("output")
    output.add_argument("--out", type=Path, help="new folder for the run (outputs/ and the time)")
    output.add_argument("--png", action="store_true", help="write the frames as PNG too")
    output.add_argument("--unguided", action="store_true", help="show the same seed without guidance too")
    output.add_argument("--decode", type=Path, metavar="LATENTS", help="finish a run from its latents.safetensors")
    output.add_argument("--dry-run", action="store_true", help="print sizes, costs and memory; load no weights")
    return p


def config_of(args: Namespace, base: MotionConfig) -> MotionConfig:
    """The model's MotionConfig with what the command line changes; sizes are rounded, and that is said."""
    given = {name: getattr(args, name) for name in ("amf", "interval", "steps", "frames", "negative")}
    given |= dict(zip(("height", "width"), args.size or (None, None)))
    given = {name: value for name, value in given.items() if value is not None}
    knobs = parse_options(base, args.set)
    if twice := sorted(given.keys() & knobs.keys()):
        raise ValueError(f"{', '.join(twice)} given twice, by a flag and by --set: keep one")
    config = replace(base, **given, **knobs)
    height, width = valid_size((config.height, config.width))
    rounded = replace(config, height=height, width=width, frames=valid_frames(config.frames))
    for name in ("height", "width", "frames"):
        if getattr(rounded, name) != getattr(config, name):
            print(f"note: {name} {getattr(config, name)} becomes {getattr(rounded, name)}")
    return rounded


def foresee(parts: dict[str, torch.nn.Module], config: MotionConfig, dtype: torch.dtype) -> list[Plan]:
    """The memory of every way to run a transfer, for weightless parts."""
    as_loaded(parts, dtype)
    return plans(parts, config, partial(one_gradient, config=config))


def dry_run(name: str, parts: dict[str, torch.nn.Module], config: MotionConfig, dtype: torch.dtype) -> None:
    """Print what a run would cost, from the sizes of the parts alone."""
    c, dit = config, parts["dit"].config
    f, h, w = (c.frames - 1) // 4 + 1, c.height // 16, c.width // 16
    tokens, block = f * h * w, c.block_of(parts["dit"])
    pairs, updates = len(frame_pairs(f, c.span)), c.guided_steps * c.inner_steps
    gradients = c.guided_steps * math.ceil(c.inner_steps / c.interval)
    plain = c.steps * (1 if c.cfg == 1 else 2) * forward_flops(dit, tokens)
    guidance = c.guided_steps * forward_flops(dit, tokens, block) + gradients * gradient_flops(dit, tokens, block)
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    print(f"model        {name}: " + ", ".join(f"{part} {n / 1e6:,.1f} M" for part, n in count.items()))
    print(f"clip         {c.frames} frames of {c.height}x{c.width} at {c.fps:g} a second")
    print(f"tokens       {f} x {h} x {w} = {tokens}, tiles {c.tile[0]}x{c.tile[1]}, window {c.window}")
    print(f"guidance     {c.guided_steps} of {c.steps} steps, block {block} of {dit.num_layers}, {pairs} frame pairs")
    print(f"evaluations  {gradients} gradients for {updates} latent updates")
    print(f"operations   denoising {plain / 1e12:,.1f} TFLOP, guidance {guidance / 1e12:,.1f} TFLOP")
    print(f"memory of a GPU in GB, weights in {dtype}, by what is offloaded and what a gradient recomputes:")
    found = foresee(parts, c, dtype)
    print(" ".join(f"{head:>9}" for head in ("offload", "recompute", *found[0].stages)))
    for way in found:
        cells = way.offload, way.recompute, *(f"{n:.2f}" for n in way.stages.values())
        print(" ".join(f"{cell:>9}" for cell in cells))


def fit_memory(args: Namespace, parts: dict[str, torch.nn.Module], config: MotionConfig, dtype: torch.dtype) -> str:
    """Set --offload to what fits into --memory, and return what a gradient must recompute."""
    if args.offload != "none":
        raise ValueError(f"--memory chooses what to offload, got --offload {args.offload} too: keep one")
    plan = choose(foresee(parts, config, dtype), args.memory)
    stage = max(plan.stages, key=plan.stages.get)
    print(f"memory: --offload {plan.offload}, recompute {plan.recompute}; at most {plan.peak:.1f} GB, to {stage}")
    args.offload = plan.offload
    return plan.recompute


def write_result(folder: Path, panels: dict[str, tuple[np.ndarray, Tensor]], settings: dict, png: bool) -> None:
    """The result, and the preview: all panels (frames, flow) with arrows of their flow. All say how they were made."""
    names = {name: Path(settings[name]).name for name in ("model", "ref")}  # folders are nobody's business
    label = {"ai_generated": True, **settings, **names}
    config, (frames, flow) = settings["config"], panels["result"]
    grid = (len(flow) + 1, frames.shape[1] // 16, frames.shape[2] // 16)
    preview = side_by_side({name: with_arrows(*panel, grid, config["tile"]) for name, panel in panels.items()})
    files = [write_video(folder / "result.mp4", frames, config["fps"], label)]
    files.append(write_video(folder / "preview.webp", preview, config["fps"], label))
    for number, frame in enumerate(frames if png else []):
        info = PngInfo()
        info.add_itxt("Description", json.dumps(label))
        Image.fromarray(frame).save(folder / f"frame{number:04d}.png", pnginfo=info)
    print("wrote", ", ".join(map(str, files)))


def finish(latents: Path, device: torch.device, png: bool) -> None:
    """Decode the latents of a run that stopped there, and write its result beside them."""
    (x, *flows), settings = load_tensors(latents, ["latents", *FLOWS])
    config = settings["config"]
    size = config["height"], config["width"]
    clip = read_video(settings["ref"], size=size, frames=config["frames"], fps=config["fps"])
    if sha256(clip.tobytes()).hexdigest() != settings["ref_sha256"]:
        raise ValueError(f"{settings['ref']} has changed since the run: put the old clip back")
    vae = load_vae(settings["model"], device=device, dtype=torch.float32)
    frames = decode(vae, x, device, config["vae_tile"])
    write_result(latents.parent, {"reference": (clip, flows[0]), "result": (frames, flows[1])}, settings, png)


def program(argv: list[str] | None) -> None:
    """Parse, then finish an old run, print a new one's costs, or do it."""
    args = parser().parse_args(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(device, args.dtype)
    if args.decode:
        finish(args.decode, device, args.png)
        return
    name, parts = build_modules(args.model)
    config = config_of(args, TINY_MOTION if name == "tiny" else MotionConfig())
    config.block_of(parts["dit"])  # raises before anything is loaded
    if args.dry_run:
        dry_run(name, parts, config, dtype)
        return
    args.recompute = None if args.memory is None else fit_memory(args, parts, config, dtype)
    if args.compile and args.offload == "blocks":
        raise ValueError("--compile needs blocks that stay on the device, got --offload blocks (or --memory chose it)")
    if args.model is None:
        args.model, args.ref, args.unguided = demo.CHECKPOINT, args.ref or demo.REFERENCE, True
        args.prompt = demo.target_scene().caption if args.prompt is None else args.prompt
    if args.ref is None or args.prompt is None:
        raise ValueError("a transfer needs --ref CLIP and --prompt TEXT (see --help)")
    if not args.prompt.strip():
        print("note: the prompt is empty, so the video shows whatever the model likes")
    transfer_files(args, config, device, dtype)


def transfer_files(args: Namespace, config: MotionConfig, device: torch.device, dtype: torch.dtype) -> None:
    """One run from file to files: what can fail cheaply comes first; nothing is written before there is a result."""
    folder = check_new_folder(args.out or Path("outputs", time.strftime("%Y%m%d-%H%M%S")))
    clip = read_video(args.ref, size=(config.height, config.width), frames=config.frames, fps=config.fps)
    if len(clip) < config.frames:
        print(f"note: {args.ref} is shorter than {config.frames} frames, so {len(clip)} are used")
        config = replace(config, frames=len(clip))
    wan = load_wan(args.model, device=device if args.offload == "none" else "cpu", dtype=dtype)
    if args.compile:
        compile_blocks(wan.dit)
    config = replace(config, block=config.block_of(wan.dit))
    settings = {"model": str(args.model.resolve()), "ref": str(args.ref.resolve())}
    settings |= {"ref_sha256": sha256(clip.tobytes()).hexdigest(), "prompt": args.prompt}
    settings |= {"seed": args.seed, "device": device.type, "dtype": str(dtype), "config": asdict(config)}
    print(f"{wan.name} on {device}, seed {args.seed}, {len(clip)} frames of {config.height}x{config.width} to {folder}")
    facts = {"offload": args.offload, "compile": args.compile}
    facts |= {"versions": versions(), "checkpoint_sha256": checkpoint_hashes(args.model)}

    def save(result: Transfer) -> None:
        flows = dict(zip(FLOWS, result.flows))
        save_tensors(folder / "latents.safetensors", {"latents": result.latents, **flows}, settings)
        record = json.dumps({**settings, **result.report, **facts}, indent=2, ensure_ascii=False)
        (folder / "run.json").write_text(record + "\n", encoding="utf-8")

    options = {"seed": args.seed, "device": device}
    options |= {"blocks": args.offload != "blocks", "recompute": args.recompute}
    result = transfer(wan, clip, args.prompt, config, **options, on_latents=save)
    save(result)  # again, with the costs of decoding
    panels = {"reference": (clip, result.flows[0]), "result": (result.frames, result.flows[1])}
    if args.unguided:
        plain = transfer(wan, clip, args.prompt, replace(config, amf="none"), **options)
        panels["without guidance"] = plain.frames, plain.flows[1]
    write_result(folder, panels, settings, args.png)
    for stage, cost in result.report["stages"].items():
        print(f"{stage:8} {cost['seconds']:8.1f} s  peak {cost['peak_gb']} GB")
    if (again := result.report.get("recompute", "none")) != "none":
        print(f"a gradient recomputed, to fit into memory: {again} (dit.RECOMPUTE says what)")
    if demo.is_default(clip, args.prompt):
        for name in list(panels)[1:]:
            print(f"{name}: {demo.summary(panels[name][0])}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after an error that its user can mend."""
    return run(program, argv)


if __name__ == "__main__":
    raise SystemExit(main())
