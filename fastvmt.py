"""FastVMT: a new video that shows a prompt with the motion of a reference clip, without training (arXiv 2602.05551).

    python fastvmt.py                                                  # tiny model and bundled clip
    python fastvmt.py --model Wan2.1-T2V-1.3B --ref clip.mp4 --prompt "a fox runs over a frozen lake"

The queries and keys of one block of the diffusion transformer show where each token goes from frame to frame: the
Attention Motion Flow (window.py). During the first denoising steps the latents are optimized (skip_optim.py) until
their motion flow matches the reference's (losses.py). `FastVMT` is that guidance, `transfer` a whole run.
"""

if __name__ == "__main__":  # before the other imports, which take a second
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
from wan_mini.device.memory import Gradient
from wan_mini.dit import WanDiT
from wan_mini.errors import check_choice, check_positive, check_range
from wan_mini.load import Wan
from wan_mini.pipeline import Transfer
from wan_mini.runs.cli import run
from wan_mini.runs.program import program
from wan_mini.runs.request import Method
from wan_mini.savings import SavingGuidance, SavingsConfig, cost_lines, rates_of, token_subset
from wan_mini.transfer import transfer_with
from window import dense_amf, frame_pairs, tile_centers, windowed_amf


@dataclass(frozen=True)
class MotionConfig(SavingsConfig):
    """The options of a transfer, with those of sampling and of savings.

    Sec., Eq.: the paper's; "release": its code at 34a050b.
    """

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
        check_range("window", self.window, 1, 10_000)
        check_range("span", self.span, 1, 10_000)
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


# By their name for --preset. "fast", chosen on training clips of the tiny model, takes half of its operations there.
PRESETS = {"fast": {"cfg_interval": (0.6, 1.0), "cache": 0.2, "interval": 4}}


class Target(NamedTuple):
    """What the latents must match."""

    flow: Tensor  # (pairs,S,2) in tokens
    centers: Tensor | None  # (pairs,tiles,2) of both videos' windows; None: each video's own, or no windows


class FastVMT(SavingGuidance):
    """Optimizes the latents before the first denoising steps until their motion flow is the reference's.

    A wan_mini.pipeline.Guidance. The reference is read without a prompt, the latents with theirs. Both carry the same
    noise, so that the flows of two equally noisy clips are compared; unless config.reference is "clean".
    """

    config: MotionConfig

    def prepare(self) -> None:
        """The tokens that the guidance sees; and, once per run, what the reference without noise gives."""
        super().prepare()
        self.clean_centers: Tensor | None = None
        self.clean: dict[tuple[int, int, int], tuple[Tensor | None, Target | None]] = {}  # by the first token
        self.choose_tokens(0)
        self.pair_count = len(self.pairs)  # of the first guided step; with frames_every, others may have one frame less

    def choose_tokens(self, phase: int) -> None:
        """Let the guidance see these tokens, all of them by default; phase: see savings.token_subset."""
        c = self.config
        subset = token_subset(self.whole_grid, c.frames_every, c.tokens_every, phase)
        self.tokens = subset.numbers  # None: all
        self.grid = subset.grid
        self.pairs = frame_pairs(self.grid[0], c.span, c.anchor_every)
        if subset.starts not in self.clean:
            self.clean[subset.starts] = self.read_clean()
        self.clean_centers, self.clean_target = self.clean[subset.starts]

    def read_clean(self) -> tuple[Tensor | None, Target | None]:
        """Centers and target that the reference without noise gives, where they are asked for."""
        config = self.config
        self.clean_centers = None
        target = None
        anchored = config.amf == "windowed" and config.window_anchor == "clean"
        targeted = config.amf != "none" and config.reference == "clean"
        if anchored or targeted:
            with torch.no_grad():
                q, k = self.queries_keys(self.reference, torch.zeros(()), self.empty_text)
                if anchored:
                    self.clean_centers = self.centers(q, k)
                if targeted:
                    target = self.target_of(q, k)
        return self.clean_centers, target

    def before_step(self, index: int, latents: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
        """Latents (1,16,F,h,w) whose motion flow is nearer to the reference's; after the guided steps, unchanged."""
        if index >= self.config.guided_steps:
            return latents
        c = self.config
        guided, skipped = divmod(index, c.guide_every)
        if skipped:
            return latents
        rates = rates_of(c.lr, c.guided_steps, c.guide_every)
        number, reused = divmod(guided, c.gradient_every)
        if reused:  # the gradient of an earlier guided step
            return optimize(latents, None, steps=c.optim_steps, lr=rates, gradient=self.state["gradient"])[0]
        self.choose_tokens(number)
        target = self.target_at(sigma, timestep)
        norms: dict[str, float] = {}
        self.key_gradient_norms.append(norms)
        loss = partial(self.loss, timestep=timestep, target=target, norms=norms)
        stop = self.is_enough if c.stop_loss > 0 else None
        latents, report = optimize(latents, loss, steps=c.optim_steps, interval=c.interval, lr=rates, stop=stop)
        self.losses.append(report.losses)
        self.gradients.append(report.gradients)
        if c.gradient_every > 1 and report.gradient is not None:
            self.state["gradient"] = report.gradient
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
        return amf, window_loss(k, self.grid, self.pairs, windows, self.config.anchor_every)

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
        c = self.options
        grid = self.whole_grid
        self.tokens = None
        q, k = self.queries_keys(latents, torch.zeros(()), self.empty_text)
        return windowed_amf(q, k, grid, frame_pairs(grid[0], 1), tau=c.tau, tile=c.tile, window=c.window)[0]

    def report(self) -> dict[str, Any]:
        """What the guidance did, for run.json."""
        report = {"pairs": self.pair_count, "block": self.block, "recompute": self.recompute, **self.spent()}
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
    return cost_lines(config, dit.config, config.block_of(dit), grid)


def method() -> Method:
    """What the command line needs to know of this method."""
    unguided = partial(replace, amf="none")
    return Method("fastvmt.py", MotionConfig(), transfer, gradient_of, costs, unguided, resumable=True, presets=PRESETS)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 if jobs failed, 2 after an error to fix, 130 after Ctrl-C."""
    return run(partial(program, method()), argv)


if __name__ == "__main__":
    raise SystemExit(main())
