"""Training of small parts beside a frozen model on one clip: the loop that every method with adapters shares.

A method says in stages what is trained on which latents with which loss. Each step draws a noise level and noise from
its own number, so a run that was stopped goes on as if it had not been.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn
from tqdm import tqdm

from wan_mini.dit import WanDiT
from wan_mini.errors import UserError, check_positive, check_range
from wan_mini.files import write_whole
from wan_mini.lora import attached
from wan_mini.pipeline import SamplingConfig
from wan_mini.scheduler import shift_sigma

SAVE_EVERY = 60.0  # seconds
LEVELS = 10  # noise levels are logged in so many equal parts of [0,1]


@dataclass(frozen=True)
class FitConfig(SamplingConfig):
    """The options of training, for every method with adapters. Pairs are of the first and the second stage."""

    fit_steps: tuple[int, int] = (0, 500)  # training steps; 0,0: no adapters at all
    fit_lr: tuple[float, float] = (1e-4, 1e-4)  # AdamW's rates, constant
    fit_decay: tuple[float, float] = (0.0, 0.0)  # AdamW's weight decay
    fit_shift: float = 5.0  # of the noise levels that are drawn; a clip's paths are decided at high ones

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("fit_steps", self.fit_steps)
        check_range("fit_lr", self.fit_lr)
        check_range("fit_decay", self.fit_decay)
        check_positive("fit_shift", self.fit_shift)


class Prediction(NamedTuple):
    """What the model says about a noised clip, and what is true."""

    velocity: Tensor  # (1,16,F,h,w), predicted
    target: Tensor  # (1,16,F,h,w), noise - clean
    noised: Tensor  # (1,16,F,h,w)
    sigma: float  # noise level in [0,1]
    rng: Generator  # for what else is drawn in this step


Loss = Callable[[Prediction], Tensor]


def denoising_loss(prediction: Prediction) -> Tensor:
    """Mean squared error of the velocity -> ()."""
    return F.mse_loss(prediction.velocity, prediction.target)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a training step: only `trained` gets gradients."""

    name: str
    clips: Sequence[Tensor]  # latents (1,16,F,h,w); one is drawn each time
    trained: nn.Module  # lora.Attachable
    frozen: tuple[nn.Module, ...] = ()  # attached too
    loss: Loss = denoising_loss
    times: tuple[float, ...] | None = None  # temporal positions of the latent frames
    share: float = 1.0  # of the steps that have this pass, at random; in the others its part is not attached at all


@dataclass(frozen=True)
class Stage:
    """Steps that do the same: all passes, then one update of all that they train."""

    name: str
    passes: Sequence[Pass]
    steps: int
    lr: float
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def parts(self) -> list[nn.Module]:
        """What is trained."""
        return [step.trained for step in self.passes]

    def optimizer(self) -> torch.optim.AdamW:
        """A new optimizer of all that is trained."""
        parameters = [weight for part in self.parts() for weight in part.parameters()]
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.decay, betas=self.betas)


Entry = dict[str, Any]  # of the log: pass, sigma, loss


def draw_sigma(rng: Generator, shift: float) -> float:
    """A noise level in [0,1]: uniform, then shifted towards 1."""
    return float(shift_sigma(torch.tensor(rng.uniform(), dtype=torch.float64), shift))


def predict(dit: WanDiT, step: Pass, text: Tensor, rng: Generator, shift: float, recompute: str) -> Prediction:
    """Noise one of the pass's clips and ask the model; text (1,L,text_dim)."""
    clean = step.clips[int(rng.integers(len(step.clips)))]
    sigma = draw_sigma(rng, shift)
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(clean.device)
    noised = (1 - sigma) * clean + sigma * noise
    timestep = torch.tensor([1000 * sigma], dtype=torch.float32)
    velocity = dit(noised, timestep, text, recompute=recompute, times=step.times)
    return Prediction(velocity, noise - clean, noised, sigma, rng)


@torch.enable_grad()
def gradients_of(dit: WanDiT, step: Pass, text: Tensor, rng: Generator, shift: float, recompute: str) -> Entry:
    """Add a pass's gradients to those of what it trains; "sigma" and "loss" (a tensor) of it."""
    step.trained.requires_grad_(True)
    for part in step.frozen:
        part.requires_grad_(False)
    with attached(dit, *step.frozen, step.trained):  # type: ignore[arg-type]  # modules that are Attachable
        prediction = predict(dit, step, text, rng, shift, recompute)
        loss = step.loss(prediction)
        loss.backward()
    return {"pass": step.name, "sigma": prediction.sigma, "loss": loss.detach()}


def passes_of(stage: Stage, rng: Generator) -> list[Pass]:
    """The passes of one step: those that are left out this time are not among the others' frozen parts either."""
    passes = []
    left_out = []
    for step in stage.passes:
        if step.share < 1 and rng.uniform() >= step.share:
            left_out.append(step.trained)
        else:
            passes.append(step)
    attached_parts = [tuple(part for part in step.frozen if part not in left_out) for step in passes]
    return [replace(step, frozen=frozen) for step, frozen in zip(passes, attached_parts, strict=True)]


class Fit:
    """A training of one clip: its stages, how far it is, and what it has logged.

    state: a file that keeps everything the next step depends on, or None; settings: what must be equal to go on;
    report: of the plan, for who goes on.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        seed: int,
        state: Path | None = None,
        settings: str = "",
        report: Mapping[str, Any] | None = None,
    ):
        self.stages = [stage for stage in stages if stage.steps > 0 and any(_has_weights(stage))]
        self.seed = seed
        self.state = state
        self.settings = settings
        self.report = dict(report or {})
        self.stage = 0
        self.step = 0
        self.log: list[Entry] = []
        self.optimizer: torch.optim.AdamW | None = None
        self.saved_at = time.monotonic()
        if state is not None and state.exists():
            self.resume(state)

    def run(self, dit: WanDiT, text: Tensor, *, shift: float, recompute: str = "none") -> list[Entry]:
        """Train all stages -> the log. text (1,L,text_dim): the clip's caption; recompute: one of dit.RECOMPUTE.

        Raises FloatingPointError on a loss that is not finite.
        """
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            if self.optimizer is None:
                self.optimizer = stage.optimizer()
            with tqdm(total=stage.steps, initial=self.step, desc=f"fit {stage.name}", unit="step") as bar:
                while self.step < stage.steps:
                    self.update(dit, stage, text, shift, recompute)
                    bar.set_postfix(loss=f"{self.log[-1]['loss']:.4f}")
                    bar.update()
            self.stage += 1
            self.step = 0
            self.optimizer = None
        return self.log

    def update(self, dit: WanDiT, stage: Stage, text: Tensor, shift: float, recompute: str) -> None:
        """One training step."""
        assert self.optimizer is not None
        rng = np.random.default_rng([self.seed % 2**64, self.stage, self.step])
        for step in passes_of(stage, rng):
            entry = gradients_of(dit, step, text, rng, shift, recompute)
            entry["loss"] = float(entry["loss"])
            if not math.isfinite(entry["loss"]):
                hint = "lower fit_lr, or use --dtype float32"
                raise FloatingPointError(f"loss of {step.name} is not finite at step {self.step + 1}: {hint}")
            self.log.append(entry)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if time.monotonic() - self.saved_at > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the state, whole or not at all."""
        if self.state is None:
            return
        parts = [part.state_dict() for stage in self.stages for part in stage.parts()]
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        content: dict[str, Any] = {"parts": parts, "optimizer": optimizer, "log": self.log}
        content |= {"stage": self.stage, "step": self.step, "settings": self.settings, "report": self.report}
        with write_whole(self.state) as unfinished:
            torch.save(content, unfinished)
        self.saved_at = time.monotonic()

    def resume(self, state: Path) -> None:
        """Go back to the last save. Raises UserError if it was made with other settings."""
        content = torch.load(state, map_location="cpu", weights_only=True)
        if content["settings"] != self.settings:
            raise UserError(f"{state} was begun with other settings: use the same, delete it, or give another --save")
        parts = [part for stage in self.stages for part in stage.parts()]
        for part, weights in zip(parts, content["parts"], strict=True):
            part.load_state_dict(weights)
        self.stage = content["stage"]
        self.step = content["step"]
        self.log = content["log"]
        if content["optimizer"] is not None:  # else between two stages, or behind the last
            self.optimizer = self.stages[self.stage].optimizer()
            self.optimizer.load_state_dict(content["optimizer"])

    def finish(self, kept: Path | None = None) -> None:
        """Delete the state, since what was trained is kept elsewhere; kept: a file in which it stays."""
        old = self.state
        self.state = kept
        self.save()
        if old is not None and old != kept:
            old.unlink(missing_ok=True)


def read_report(state: Path | None) -> dict[str, Any] | None:
    """The report of the plan that a stopped training went by; None if there is no state."""
    if state is None or not state.exists():
        return None
    report: dict[str, Any] = torch.load(state, map_location="cpu", weights_only=True)["report"]
    return report


def _has_weights(stage: Stage) -> Iterator[bool]:
    """For each of a stage's parts, whether there is anything to train: no head may have a label."""
    for part in stage.parts():
        yield any(True for _ in part.parameters())


def loss_by_level(log: Sequence[Entry]) -> dict[str, dict[str, list[float | None]]]:
    """Mean losses by tenths of the noise level, {pass: {"first half": [10], "second half": [10]}}; None: none drawn.

    The mean alone hides what matters: a clip's paths are decided where the noise is high.
    """
    table: dict[str, dict[str, list[float | None]]] = {}
    for name in dict.fromkeys(entry["pass"] for entry in log):
        entries = [entry for entry in log if entry["pass"] == name]
        middle = len(entries) // 2
        halves = {"first half": entries[:middle], "second half": entries[middle:]}
        table[name] = {half: _mean_by_level(part) for half, part in halves.items()}
    return table


def _mean_by_level(entries: Sequence[Entry]) -> list[float | None]:
    """Mean loss in each tenth of the noise level."""
    losses: list[list[float]] = [[] for _ in range(LEVELS)]
    for entry in entries:
        level = min(int(LEVELS * entry["sigma"]), LEVELS - 1)
        losses[level].append(entry["loss"])
    return [float(np.mean(part)) if part else None for part in losses]
