"""The loop of every stage: draw, step, average, save, and go on after a pause."""

import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor, nn

from wan_mini.errors import UserError
from wan_mini.files import Unwritable, write_whole
from wan_mini.tiny.training.data import Sampler
from wan_mini.tiny.training.muon import Muon, split_parameters
from wan_mini.tiny.training.recipe import Batch, Recipe

SAVE_EVERY = 600  # seconds; the figures and samples of a save take about one minute
LOG_EVERY = 20  # steps

Items = list[dict[str, Any]]
Figures = dict[str, float]
LossFunction = Callable[[Any, Items, Batch, Generator], tuple[Tensor, Figures]]


@dataclass(frozen=True)
class Job:
    """One command: where it works, how long, and with what. `deadline` is in seconds of time.monotonic()."""

    work: Path
    folder: Path
    device: torch.device
    dtype: torch.dtype  # of the matrix products
    seed: int = 0
    workers: int = 1
    deadline: float = math.inf


def rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then constant, then a linear fall to zero at the last step."""
    fall = (recipe.steps - step) / max(recipe.decay, 1)
    return min((step + 1) / recipe.warmup, 1.0, fall)


def batch_at(step: int, recipe: Recipe) -> Batch:
    """What step number `step` is trained on."""
    begin = 0
    for phase in recipe.phases:
        if step < begin + phase.steps:
            return phase.batches[(step - begin) % len(phase.batches)]
        begin += phase.steps
    raise ValueError(f"step {step} comes after the last phase of {recipe.steps} steps")


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the average a little towards the weights; a young average forgets its random start fast."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Trainer:
    """Weights, their moving average, optimizers and counters of one stage; one file holds them all."""

    def __init__(self, name: str, recipe: Recipe, job: Job, model: nn.Module, sampler: Sampler):
        self.name = name
        self.recipe = recipe
        self.job = job
        self.sampler = sampler
        self.model = model.to(job.device).train()
        self.ema: Any = deepcopy(self.model).requires_grad_(False).eval()
        self.optimizers = make_optimizers(self.model, recipe, job.dtype)
        self.losses: list[Figures] = []
        self.step = 0
        self.seconds = 0.0
        self.file = job.work / f"{name}.pt"
        if self.file.exists():
            self.resume()

    def parts(self) -> dict[str, Any]:
        """What has a state dict."""
        muon, adam = self.optimizers
        return {"model": self.model, "ema": self.ema, "muon": muon, "adam": adam}

    def settings(self) -> str:
        """What a run that goes on must have in common with the one that began."""
        return json.dumps({"seed": self.job.seed, **asdict(self.recipe)})

    def save(self) -> None:
        """Write everything that the next step depends on, whole or not at all."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"step": self.step, "seconds": self.seconds, "drawn": self.sampler.drawn, "losses": self.losses}
        try:
            with write_whole(self.file) as part:
                torch.save(state | {"settings": self.settings()}, part)
        except RuntimeError as problem:  # torch's word for a disk that is full
            raise Unwritable(f"cannot write {self.file} ({problem}): make room, the last state is whole") from None

    def resume(self) -> None:
        """Go back to the last save. Raises UserError if it was made with other settings, or is damaged."""
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except Exception as problem:  # on broken bytes torch raises RuntimeError, EOFError, UnpicklingError and more
            raise UserError(f"{self.file} is no state ({type(problem).__name__}): remove it to begin anew") from problem
        if settings != self.settings():
            raise UserError(f"{self.file} was begun with {settings}: use these, or another --work")
        try:
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            self.step = state["step"]
            self.seconds = state["seconds"]
            self.losses = state["losses"]
            self.sampler.drawn.update(state["drawn"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
            reason = str(problem).splitlines()[0]
            raise UserError(f"{self.file} is no whole state ({reason}): remove it to begin anew") from problem

    def run(self, loss_of: LossFunction, draw_samples: Callable[[], np.ndarray]) -> None:
        """Step until the end, with a save and a picture of samples every few minutes.

        loss_of: model, items, batch, generator -> loss, figures for the log. Raises SystemExit at the deadline,
        FloatingPointError on a loss that is not finite.
        """
        clock = time.monotonic()
        self.sampler.publish()
        while self.step < self.recipe.steps:
            self.losses.append(self.train_step(loss_of))
            if self.step % LOG_EVERY == 0:
                self.sampler.publish()
                self.log()
            late = time.monotonic() > self.job.deadline
            if late or self.step == self.recipe.steps or time.monotonic() - clock > SAVE_EVERY:
                self.seconds += time.monotonic() - clock
                clock = time.monotonic()
                self.save()
                Image.fromarray(draw_samples()).save(self.job.work / f"{self.name}-{self.step:06}.png")
            if late and self.step < self.recipe.steps:
                raise SystemExit(f"paused after step {self.step} of {self.recipe.steps}: the same command goes on")

    def train_step(self, loss_of: LossFunction) -> Figures:
        """Draw a batch, update the weights and their average; figures for the log, times in seconds."""
        start = time.monotonic()
        rng = np.random.default_rng((self.job.seed, self.step))
        batch = batch_at(self.step, self.recipe)
        items = self.sampler.draw(batch.stream, batch.items, rng)
        drawn = time.monotonic()
        loss, figures = loss_of(self.model, items, batch, rng)
        loss.backward()
        factor = rate_factor(self.step, self.recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]
            optimizer.step()
            optimizer.zero_grad()
        update_ema(self.ema, self.model, self.step, self.recipe.ema)
        self.step += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of {self.name} is not finite at step {self.step}: lower the rates")
        seconds = {"data_s": drawn - start, "step_s": time.monotonic() - drawn}
        return {"step": self.step, "frames": batch.frames, "loss": value, **figures, **seconds}

    def log(self) -> None:
        """Print one line on the last steps: means by number of frames."""
        recent = self.losses[-LOG_EVERY:]
        line = [f"{time.strftime('%H:%M:%S')} {self.name} {self.step}"]
        for frames in sorted({entry["frames"] for entry in recent}):
            entries = [entry for entry in recent if entry["frames"] == frames]
            line.append(f"[{frames} frames:")
            for key in list(entries[0])[2:]:  # all but step and frames
                mean = np.mean([entry[key] for entry in entries])
                line.append(f"{key} {mean:.4f}")
            line[-1] += "]"
        print(" ".join(line), flush=True)


def make_optimizers(model: nn.Module, recipe: Recipe, dtype: torch.dtype) -> tuple[Muon, torch.optim.Adam]:
    """Muon for matrices, Adam for the rest; each group keeps its rate as `peak_lr`."""
    matrices, rest = split_parameters(model)
    adam = torch.optim.Adam(rest, lr=recipe.adam_lr, betas=(0.9, 0.99), foreach=True)
    optimizers = (Muon(matrices, recipe.muon_lr, dtype), adam)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
