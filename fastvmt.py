"""FastVMT: a new video that shows a prompt with the motion of a reference clip, without training (arXiv 2602.05551).

    python fastvmt.py                                                  # tiny model and bundled clip
    python fastvmt.py --model Wan2.1-T2V-1.3B --ref clip.mp4 --prompt "a fox runs over a frozen lake"

The queries and keys of one block of the diffusion transformer show where each token goes from frame to frame: the
Attention Motion Flow (window.py). During the first denoising steps the latents are optimized (skip_optim.py) until
their motion flow matches the reference's (losses.py). `FastVMT` is that guidance, `transfer` a whole run.
"""

if __name__ == "__main__":
    from wan_mini.runs.interrupt import end_quietly

    end_quietly()

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losses import amf_loss, key_gradient_norms, total_loss, window_loss
from skip_optim import optimize
from wan_mini.device.flops import forward_flops, gradient_flops
from wan_mini.device.memory import Gradient
from wan_mini.dit import WanDiT
from wan_mini.errors import check_choice, check_positive, check_range
from wan_mini.load import Wan
from wan_mini.pipeline import SamplingConfig, Transfer
from wan_mini.runs.cli import run
from wan_mini.runs.program import program
from wan_mini.runs.request import Method
from wan_mini.transfer import transfer_with
from window import dense_amf, frame_pairs, tile_centers, windowed_amf


@dataclass(frozen=True)
class MotionConfig(SamplingConfig):
    """The options of a transfer, with those of sampling. Sec., Eq.: the paper's; "release": its code at 34a050b."""

    amf: str = "windowed"  # "windowed" (FastVMT), "dense" (all pairs of tokens), "none" (no guidance)
    guidance_fraction: float = 0.2  # share of the steps, from the first, that is guided (Sec. 4.1)
    optim_steps: int = 10  # latent updates in a guided step (Sec. 4.1)
    interval: int = 3  # updates per gradient (Eq. 9; release: 3)
    lr: tuple[float, float] = (0.003, 0.002)  # AdamW's rate at the first and at the last update (Sec. 4.1)
    block: int | None = None  # whose queries and keys are read; None: the middle one, 14 of 30 (Fig. 7, "15th block")
    tau: float = 2.0  # factor of the heads' mean logits (as DiTFlow, arXiv 2412.07776; the release scales other logits)
    tile: tuple[int, int] = (3, 4)  # tokens, rows and columns (release)
    window: int = 21  # tokens, side of the square window (release)
    span: int = 4  # largest distance of a frame pair (release, corrected: there the largest is 3)
    alpha: float = 0.2  # how much less the farthest pair weighs (Eq. 6)
    weights: tuple[float, float] = (5.0, 1.0)  # of the AMF loss and the window loss (Eq. 8)
    # Ablations. Windows lie around the matches of the reference, "clean" or "noised", or of each video itself: "self",
    # anew at each gradient (release). The target is the flow of the reference, "noised" as the latents are (Sec. 4.1,
    # release) or "clean", once per run (Sec. 3.2); then "noised" windows are the clean ones. A tile's match is the best
    # one, "argmax" (Eq. 4), or a mean over the frame, "soft" (Eq. 2; release).
    window_anchor: str = "clean"
    reference: str = "noised"
    centroid: str = "argmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("amf", self.amf, ("windowed", "dense", "none"))
        check_range("guidance_fraction", self.guidance_fraction, 0, 1)
        check_range("optim_steps", self.optim_steps, 1, 10_000)
        check_range("interval", self.interval, 1)
        check_range("lr", self.lr)
        check_positive("tau", self.tau)
        check_range("tile", self.tile, 1, 256)
        check_range("window", self.window, 1)
        check_range("span", self.span, 1)
        check_range("alpha", self.alpha, 0, 1)
        check_range("weights", self.weights)
        check_choice("window_anchor", self.window_anchor, ("clean", "noised", "self"))
        check_choice("reference", self.reference, ("noised", "clean"))
        check_choice("centroid", self.centroid, ("argmax", "soft"))

    @property
    def guided_steps(self) -> int:
        """Number of guided denoising steps."""
        if self.amf == "none":
            return 0
        return math.ceil(round(self.guidance_fraction * self.steps, 6))  # 0.2 * 15 is a little more than 3

    def block_of(self, dit: WanDiT) -> int:
        """The block whose queries and keys are read; by default 14 of 30, and the middle one of other depths."""
        count = dit.config.num_layers
        block = (count - 1) // 2 if self.block is None else self.block
        check_range("block", block, 0, count - 1)
        return block


class Target(NamedTuple):
    """What the latents must match."""

    flow: Tensor  # (pairs,S,2) in tokens
    centers: Tensor | None  # (pairs,tiles,2) of both videos' windows; None: each video's own, or no windows


class FastVMT:
    """Optimizes the latents before the first denoising steps until their motion flow is the reference's.

    A wan_mini.pipeline.Guidance. The reference is read without a prompt, the latents with theirs. Both carry the same
    noise, so that the flows of two equally noisy clips are compared; unless config.reference is "clean".
    """

    history = ("losses", "key_gradient_norms")  # grow with the guided steps

    def __init__(
        self,
        dit: WanDiT,
        reference: Tensor,
        noise: Tensor,
        text: Tensor,
        empty_text: Tensor,
        config: MotionConfig,
        recompute: str = "none",
    ):
        """reference, noise (1,16,F,h,w) latents; text, empty_text (1,L,text_dim); recompute: one of dit.RECOMPUTE."""
        self.dit = dit
        self.reference = reference
        self.noise = noise
        self.text = text
        self.empty_text = empty_text
        self.config = config
        self.recompute = recompute
        self.block = config.block_of(dit)
        self.grid = dit.grid(reference)
        self.pairs = frame_pairs(self.grid[0], config.span)
        self.next_pairs = frame_pairs(self.grid[0], 1)
        self.status: dict[str, str] = {}
        self.losses: list[list[float]] = []  # of each guided step, at each gradient
        self.key_gradient_norms: list[dict[str, float]] = []  # of each guided step, at its first gradient
        self.clean_centers: Tensor | None = None
        self.clean_target: Target | None = None
        anchored = config.amf == "windowed" and config.window_anchor == "clean"
        targeted = config.amf != "none" and config.reference == "clean"
        if anchored or targeted:  # once per run, from the reference without noise
            with torch.no_grad():
                q, k = self.queries_keys(reference, torch.zeros(()), empty_text)
                if anchored:
                    self.clean_centers = self.centers(q, k)
                if targeted:
                    self.clean_target = self.target_of(q, k)

    def before_step(self, index: int, latents: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
        """Latents (1,16,F,h,w) whose motion flow is nearer to the reference's; after the guided steps, unchanged."""
        if index >= self.config.guided_steps:
            return latents
        target = self.target_at(sigma, timestep)
        norms: dict[str, float] = {}
        self.key_gradient_norms.append(norms)
        loss = partial(self.loss, timestep=timestep, target=target, norms=norms)
        c = self.config
        latents, report = optimize(latents, loss, steps=c.optim_steps, interval=c.interval, lr=c.lr)
        self.losses.append(report.losses)
        return latents

    def target_at(self, sigma: Tensor, timestep: Tensor) -> Target:
        """The target at noise level sigma in [0,1], which is timestep / 1000."""
        if self.clean_target is not None:
            return self.clean_target
        noised = (1 - sigma) * self.reference + sigma * self.noise
        q, k = self.queries_keys(noised, timestep, self.empty_text)
        return self.target_of(q, k)

    def target_of(self, q: Tensor, k: Tensor) -> Target:
        """The target that the reference's queries and keys, (1,N,M,D) each, define."""
        centers = self.clean_centers
        if self.config.amf == "windowed" and self.config.window_anchor == "noised":
            centers = self.centers(q, k)
        flow, _ = self.flow(q, k, centers)
        return Target(flow, centers)

    def loss(self, latents: Tensor, timestep: Tensor, target: Target, norms: dict[str, float]) -> Tensor:
        """Weighted sum of both losses (Eq. 8) for latents (1,16,F,h,w); fills norms the first time -> ()."""
        q, k = self.queries_keys(latents, timestep, self.text)
        amf, window = self.losses_of(q, k, target)
        self.status = {"amf": f"{amf.item():.4g}", "window": f"{window.item():.4g}"}
        if not norms:
            norms.update(key_gradient_norms(amf, window, self.config.weights, k))
        return total_loss(amf, window, self.config.weights)

    def losses_of(self, q: Tensor, k: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """AMF loss (Eq. 5) and window loss (Eq. 7; 0 for dense flow, which has no windows) -> () and ()."""
        flow, windows = self.flow(q, k, target.centers)
        amf = amf_loss(target.flow, flow, self.pairs, self.config.span, self.config.alpha)
        if windows is None:
            return amf, k.new_zeros(())
        return amf, window_loss(k, self.grid, self.pairs, windows)

    def queries_keys(self, latents: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of the block, (1,N,M,D) each, for latents (1,16,F,h,w) and a timestep () in [0,1000]."""
        recompute = self.recompute if latents.requires_grad else "none"
        return self.dit(latents, timestep.reshape(1), text, qk_block=self.block, recompute=recompute)

    def centers(self, q: Tensor, k: Tensor) -> Tensor:
        """Where each tile is found in the other frame (Eq. 1, 4), (pairs,tiles,2) in tokens."""
        c = self.config
        return tile_centers(q, k, self.grid, self.pairs, tile=c.tile, kind=c.centroid, tau=c.tau)

    def flow(self, q: Tensor, k: Tensor, centers: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Motion flow (pairs,S,2) in tokens (Eq. 3), and its windows (pairs,tiles,keys) if it has any."""
        c = self.config
        if c.amf == "dense":
            return dense_amf(q, k, self.grid, self.pairs, tau=c.tau), None
        if centers is None:
            centers = self.centers(q, k)
        return windowed_amf(q, k, self.grid, self.pairs, tau=c.tau, tile=c.tile, window=c.window, centers=centers)

    def clean_flow(self, latents: Tensor) -> Tensor:
        """Flow of a clean clip from each latent frame to the next, (F-1,S,2) in tokens, around its own matches."""
        c = self.config
        q, k = self.queries_keys(latents, torch.zeros(()), self.empty_text)
        return windowed_amf(q, k, self.grid, self.next_pairs, tau=c.tau, tile=c.tile, window=c.window)[0]

    def close(self) -> None:
        """Nothing to undo: the transformer is only read."""

    def report(self) -> dict[str, Any]:
        """What the guidance did, for run.json."""
        gradients = sum(len(losses) for losses in self.losses)
        report = {"gradients": gradients, "pairs": len(self.pairs), "block": self.block, "recompute": self.recompute}
        return {"losses": self.losses, "key_gradient_norms": self.key_gradient_norms, **report}


def transfer(wan: Wan, clip: np.ndarray, prompt: str, config: MotionConfig, **options: Any) -> Transfer:
    """Generate a video of `prompt` that moves like `clip`: text, encode, guided denoising, decode.

    clip (T,H,W,3) uint8, T = 4k+1, H and W multiples of 16. options: seed, device, offload_blocks, recompute, timer,
    on_latents, journal, as wan_mini.transfer.transfer_with takes them. Raises UserError, FloatingPointError.
    """
    return transfer_with(FastVMT, gradient_of(config), wan, clip, prompt, config, **options)


@cache  # equal options give the same function, by which gradient_bytes knows what it has counted
def gradient_of(config: MotionConfig) -> Gradient | None:
    """One gradient of the guidance as far as memory is concerned, None without guidance."""

    def gradient(dit: WanDiT, latents: Tensor, text: Tensor, recompute: str) -> None:
        guidance = FastVMT(dit, latents, latents, text, text, config, recompute)
        x = latents.detach().requires_grad_()
        with torch.enable_grad():
            q, k = guidance.queries_keys(x, torch.tensor(500.0), text)
            flow = q.new_zeros(len(guidance.pairs), guidance.grid[1] * guidance.grid[2], 2)
            losses = guidance.losses_of(q, k, Target(flow, guidance.clean_centers))
            torch.autograd.grad(total_loss(*losses, config.weights), x)

    return None if config.amf == "none" else gradient


def costs(config: MotionConfig, dit: WanDiT, grid: tuple[int, int, int]) -> list[str]:
    """What guiding a clip with this token grid costs, in lines for --dry-run."""
    c, block, tokens = config, config.block_of(dit), math.prod(grid)
    updates = c.guided_steps * c.optim_steps
    gradients = c.guided_steps * math.ceil(c.optim_steps / c.interval)
    readings = c.guided_steps if c.reference == "noised" else 1  # of the reference; not counted: those of clean clips
    flops = readings * forward_flops(dit.config, tokens, block)
    flops += gradients * gradient_flops(dit.config, tokens, block)
    where = f"block {block} of {dit.config.num_layers}, {len(frame_pairs(grid[0], c.span))} frame pairs"
    return [
        f"guidance     {c.guided_steps} of {c.steps} steps, {where}, tiles {c.tile[0]}x{c.tile[1]}, window {c.window}",
        f"             {gradients} gradients for {updates} latent updates, {flops / 1e12:,.1f} TFLOP",
    ]


def method() -> Method:
    """What the command line needs to know of this method."""
    unguided = partial(replace, amf="none")
    return Method("fastvmt.py", MotionConfig(), transfer, gradient_of, costs, unguided, resumable=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 if jobs failed, 2 after an error to fix, 130 after Ctrl-C."""
    return run(partial(program, method()), argv)


if __name__ == "__main__":
    raise SystemExit(main())
