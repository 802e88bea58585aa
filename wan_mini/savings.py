"""Ways to make a guided run cheaper: options of sampling and of guidance, each one idea, each off by default.

    cfg_interval     two passes of the transformer only between two noise levels, one elsewhere (arXiv 2404.07724)
    cache            a velocity serves until the latents have changed by so much (TeaCache, arXiv 2411.19108, without
                     its fitted polynomial; EasyCache, arXiv 2507.02860)
    guide_every      fewer guided steps, whose larger rates move the latents as far (sum of rate x updates)
    gradient_every   a gradient serves several guided steps, not only several updates in one
    anchor_every     fewer anchor frames, and so fewer frame pairs
    frames_every     the blocks of the guidance see some of the latent frames, other ones at each guided step
    tokens_every     they see some rows and columns of tokens; all keep their positions (RoPE)
    stop_loss        a guided step ends when its loss has fallen to a share of its first

At its default an option changes no bit. When it is on, none is exact but in a limit: cfg_interval where cfg is 1, cache
while the velocity is constant, gradient_every while the gradient is. The savings that are always exact are no options:
the pass to the queries and keys of one block stops there, and a clean reference is read once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan_mini.config import DiTConfig
from wan_mini.device.flops import forward_flops, gradient_flops, patch_embedding_flops
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError, check_range
from wan_mini.pipeline import SamplingConfig, guided_velocity
from wan_mini.scheduler import FlowEuler
from wan_mini.transfer import ReferenceGuidance

Grid = tuple[int, int, int]  # F, H, W


@dataclass(frozen=True)
class SavingsConfig(SamplingConfig):
    """The options of sampling, and those that make a run cheaper and its result another one; the top of savings.py."""

    cfg_interval: tuple[float, float] = (0.0, 1.0)  # noise levels; outside, the prompt's velocity alone
    cache: float = 0.0  # sum of relative changes of the latents (L1) below which a velocity is used again
    guide_every: int = 1  # of the first steps, each n-th is guided, at a rate that moves the latents as far
    gradient_every: int = 1  # guided steps that share one step's last gradient
    anchor_every: int = 1  # latent frames from one anchor frame to the next
    frames_every: int = 1  # latent frames from one that the guidance sees to the next
    tokens_every: int = 1  # rows, and columns, from one that the guidance sees to the next
    stop_loss: float = 0.0  # share of a guided step's first loss at which the step ends

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("cfg_interval", self.cfg_interval, 0, 1)
        if self.cfg_interval[0] > self.cfg_interval[1]:
            raise UserError(f"cfg_interval must be the lower noise level and then the higher, got {self.cfg_interval}")
        check_range("cache", self.cache)
        for name in ("guide_every", "gradient_every", "anchor_every", "frames_every", "tokens_every"):
            check_range(name, getattr(self, name), 1)
        check_range("stop_loss", self.stop_loss, 0, 1)


def passes_at(config: SamplingConfig, timestep: float) -> int:
    """Passes of the transformer in a step at a timestep in [0,1000], if its velocity is computed: 2, or 1."""
    low, high = getattr(config, "cfg_interval", (0.0, 1.0))  # methods without these options always guide
    return 2 if config.cfg != 1 and 1000 * low <= timestep <= 1000 * high else 1


def sampling_passes(config: SamplingConfig) -> int:
    """Passes of the transformer in a run; with a cache, the most that there can be."""
    timesteps = FlowEuler(config.steps, config.shift, config.strength).timesteps
    return sum(passes_at(config, timestep) for timestep in timesteps.tolist())


class SavedVelocity:
    """The velocity of each step, by as few passes as the options allow. A pipeline.VelocityFunction.

    state: keeps tensors from step to step; passes: gets the number of passes of each step.
    """

    def __init__(self, config: SavingsConfig, state: dict[str, Tensor], passes: list[int]):
        self.config = config
        self.state = state
        self.passes = passes

    def __call__(
        self, dit: WanDiT, latents: Tensor, timestep: Tensor, text: Tensor, negative_text: Tensor, cfg: float
    ) -> Tensor:
        """Arguments and result as in pipeline.guided_velocity."""
        if self.config.cache > 0 and self.is_fresh(dit, latents):
            self.passes.append(0)
            return self.state["velocity"]
        passes = passes_at(self.config, timestep.item())
        self.passes.append(passes)
        scale = cfg if passes == 2 else 1.0
        velocity = guided_velocity(dit, latents, timestep, text, negative_text, scale)
        if self.config.cache > 0:
            self.state.update(velocity=velocity, change=torch.zeros(()))
        return velocity

    def is_fresh(self, dit: WanDiT, latents: Tensor) -> bool:
        """Whether the last velocity still serves; adds the latents' relative change since the last step."""
        before = self.state.get("input")
        self.state["input"] = latents.clone()
        if before is None:
            return False
        change = (latents - before).abs().sum() / before.abs().sum()
        self.state["change"] = self.state["change"].cpu() + change.cpu()
        stale = self.state["change"] >= self.config.cache
        return not dit.ranks.agree(int(stale))  # all processes decide alike


class TokenSubset(NamedTuple):
    """Some tokens of a clip, which form a grid themselves."""

    grid: Grid
    numbers: Tensor | None  # (N',) in raster order, on the CPU; None: all tokens
    starts: Grid  # the first frame, row and column


def token_subset(grid: Grid, frames: int, side: int, phase: int) -> TokenSubset:
    """Every `frames`-th latent frame, every `side`-th row and column of a token grid.

    phase: 0, 1, ...: where they begin, in turn. All tokens are in one of frames * side^2 subsets, but for those of
    middle frames if a clip has fewer than 2 * frames of them: a subset needs two frames.
    Raises UserError if there are not two latent frames, one row and one column left.
    """
    if frames == side == 1:
        return TokenSubset(grid, None, (0, 0, 0))
    count, height, width = grid
    if count <= frames or min(height, width) < side:
        raise UserError(f"frames_every and tokens_every leave no motion in a grid of {grid}, got {frames} and {side}")
    first_frame = min(phase % frames, count - 1 - frames)  # two frames at least
    first_row = phase // frames % side
    first_column = phase // (frames * side) % side
    numbers = torch.arange(count * height * width).reshape(grid)
    chosen = numbers[first_frame::frames, first_row::side, first_column::side]  # (F,H,W) -> (F',H',W')
    rows, columns = chosen.shape[1:]
    return TokenSubset((len(chosen), rows, columns), chosen.flatten(), (first_frame, first_row, first_column))


def rates_of(lr: tuple[float, float], steps: int, every: int) -> tuple[float, float]:
    """AdamW's rates where each `every`-th of `steps` steps is guided: the sum of rate x updates over all stays."""
    scale = steps / len(range(0, steps, every))
    return scale * lr[0], scale * lr[1]


def thinned(config: Any) -> Any:
    """A method's options with its lengths in units of what the guidance sees: tile, window (tokens), span (frames)."""
    side = config.tokens_every
    tile = math.ceil(config.tile[0] / side), math.ceil(config.tile[1] / side)
    span = math.ceil(config.span / config.frames_every)
    return replace(config, tile=tile, window=math.ceil(config.window / side), span=span)


class Cost(NamedTuple):
    """What the guidance of a run costs."""

    gradients: int
    flops: int  # operations of the transformer
    flow: int  # of the motion flow's logits, forward and backward; smaller products do not count


def guidance_cost(
    config: Any, dit: DiTConfig, block: int, grid: Grid, counts: Sequence[tuple[int, int]] | None = None
) -> Cost:
    """Operations of reading the references and of the gradients, for a motion-flow method's options and a token grid.

    counts: losses and gradients of each guided step that has its own, as a run had them; None: the most there can be.
    The reading of a clean reference for its windows alone does not count.
    """
    guided = len(range(0, config.guided_steps, config.guide_every))
    if counts is None:
        planned = math.ceil(config.optim_steps / config.interval)
        counts = [(planned, planned)] * math.ceil(guided / config.gradient_every)
    span = thinned(config).span
    products = 4 if config.amf == "dense" else 3  # a forward's, its two in the backward, and dense flow's made again
    flops = flow = 0
    read = set()
    for number, (losses, gradients) in enumerate(counts):
        subset = token_subset(grid, config.frames_every, config.tokens_every, number)
        forward, gradient = subset_flops(dit, math.prod(grid), math.prod(subset.grid), block)
        reads_reference = config.reference == "noised" or subset.starts not in read
        read.add(subset.starts)
        forwards = losses - gradients + reads_reference
        logits = flow_flops(dit, subset.grid, span, config.anchor_every)
        flops += forwards * forward + gradients * gradient
        flow += (forwards + products * gradients) * logits
    return Cost(sum(gradients for _, gradients in counts), flops, flow)


def subset_flops(config: DiTConfig, tokens: int, kept: int, block: int) -> tuple[int, int]:
    """Operations of one reading of a block's queries and keys, and of one gradient, if blocks see `kept` of all tokens.

    All patches are embedded.
    """
    others = patch_embedding_flops(config, tokens - kept)
    return forward_flops(config, kept, block) + others, gradient_flops(config, kept, block) + 2 * others


def pair_count(frames: int, span: int, anchor_every: int) -> int:
    """Number of frame pairs (i, j) with 1 <= j - i <= span whose anchor i is 0, n, 2n, ..."""
    count = 0
    for distance in range(1, min(span, frames - 1) + 1):
        count += len(range(0, frames - distance, anchor_every))
    return count


def flow_flops(config: DiTConfig, grid: Grid, span: int, anchor_every: int) -> int:
    """Operations of the logits of all frame pairs of a motion flow."""
    frames, height, width = grid
    return 2 * pair_count(frames, span, anchor_every) * (height * width) ** 2 * config.dim


def cost_lines(config: Any, dit: DiTConfig, block: int, grid: Grid) -> list[str]:
    """What guidance costs at most, in lines for --dry-run."""
    c = thinned(config)
    guided = len(range(0, c.guided_steps, c.guide_every))
    updates = guided * c.optim_steps
    cost = guidance_cost(config, dit, block, grid)
    frames = token_subset(grid, c.frames_every, c.tokens_every, 0).grid[0]
    pairs = f"{pair_count(frames, c.span, c.anchor_every)} frame pairs"
    tiles = f"tiles {c.tile[0]}x{c.tile[1]}, window {c.window}"
    return [
        f"guidance     {guided} of {c.steps} steps, block {block} of {dit.num_layers}, {pairs}, {tiles}",
        f"             {cost.gradients} gradients for {updates} latent updates, {cost.flops / 1e12:,.1f} TFLOP",
        f"             {cost.flow / 1e12:,.1f} TFLOP for their motion flow",
    ]


class SavingGuidance(ReferenceGuidance):
    """What a guidance with these options keeps from step to step, and what it has cost."""

    history = ("losses", "gradients", "key_gradient_norms", "passes")  # grow with the steps
    tokens: Tensor | None = None  # numbers of those that it sees; None: all

    def prepare(self) -> None:
        """The options in units of what it sees, and empty records."""
        self.options = self.config  # as given
        self.config = thinned(self.config)
        self.whole_grid = self.grid
        self.gradients: list[int] = []  # of each guided step with gradients of its own
        self.key_gradient_norms: list[dict[str, float]] = []  # of each of these steps, at its first gradient
        self.passes: list[int] = []  # of each denoising step
        self.state: dict[str, Tensor] = {}  # what savings carry from step to step
        self.velocity_of = SavedVelocity(self.options, self.state, self.passes)

    def queries_keys(self, latents: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """As in ReferenceGuidance, of the tokens that it sees."""
        recompute = self.recompute if latents.requires_grad else "none"
        at = timestep.reshape(1)
        return self.dit(latents, at, text, qk_block=self.block, recompute=recompute, tokens=self.tokens)

    def is_enough(self, losses: list[float]) -> bool:
        """Whether the last of a guided step's losses lets it end; all processes decide alike."""
        return self.dit.ranks.agree(int(losses[-1] > self.options.stop_loss * losses[0])) == 0

    def spent(self) -> dict[str, Any]:
        """The gradients and passes so far, and their operations."""
        counts = [(len(losses), gradients) for losses, gradients in zip(self.losses, self.gradients, strict=True)]
        cost = guidance_cost(self.options, self.dit.config, self.block, self.whole_grid, counts)
        denoising = sum(self.passes) * forward_flops(self.dit.config, math.prod(self.whole_grid))
        flops = {"guidance": cost.flops, "flow": cost.flow, "denoising": denoising}
        return {"gradients": cost.gradients, "passes": self.passes, "flops": flops}
