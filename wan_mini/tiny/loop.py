"""The loop behind every stage of training: step, average, save, go on after a pause, and tell how it went."""

import json
import math
import os
import platform
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from wan_mini.device.select import has_fast_bfloat16
from wan_mini.hashes import sha256_file
from wan_mini.tiny.muon import Muon, split_parameters

SAVE_EVERY = 300  # seconds


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained."""

    steps: int
    batch: int
    clips: int  # rendered once: seeds 0, 1, ... of the world's training split
    lr: float = 0.02  # of Muon, for matrices
    adam_lr: float = 3e-3  # for the rest: biases, gains, embeddings
    warmup: int = 50  # steps
    decay: tuple[tuple[float, float], ...] = ((0, 1), (1, 0))  # knots: share of the steps, factor of both rates
    ema: float = 0.999


@dataclass(frozen=True)
class Job:
    """One command: where it works, how long, and with what. `deadline` is in seconds of time.monotonic()."""

    recipe: Recipe
    work: Path
    folder: Path
    device: torch.device
    seed: int = 0
    workers: int = 1
    deadline: float = math.inf
    command: str = ""


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Rise linearly over the warm-up, while the averages are still poor; then along the recipe's decay."""
    decay = np.interp(step / recipe.steps, *zip(*recipe.decay))
    return min(1.0, (step + 1) / recipe.warmup) * float(decay)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the average a little towards the weights: ema = d ema + (1 - d) weights, with d small at first."""
    decay = min(decay, (1 + step) / (10 + step))  # else the average would remember its random start
    for slow, fast in zip(ema.parameters(), model.parameters()):
        slow.lerp_(fast, 1 - decay)


class Training:
    """Weights, their moving average, the optimizer and the losses so far; on disk in one file at every save."""

    def __init__(self, name: str, job: Job, model: nn.Module):
        self.name, self.job, self.model = name, job, model.to(job.device).train()
        self.ema = deepcopy(model).requires_grad_(False).eval()
        matrices, rest = split_parameters(model)
        self.muon = Muon(matrices, job.recipe.lr)
        self.adam = torch.optim.Adam(rest, job.recipe.adam_lr, betas=(0.9, 0.99))
        self.losses, self.seconds = [], 0.0
        self.file = job.work / f"{name}.pt"
        if self.file.exists():
            self.resume()

    @property
    def parts(self) -> dict:
        return {"model": self.model, "ema": self.ema, "muon": self.muon, "adam": self.adam}

    @property
    def settings(self) -> dict:
        return {"seed": self.job.seed, **asdict(self.job.recipe)}

    def save(self) -> None:
        """Write everything that the next step depends on."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"losses": self.losses, "seconds": self.seconds, "settings": self.settings}
        replace_file(self.file, partial(torch.save, state))

    def resume(self) -> None:
        """Go back to the last save. Raises ValueError if it was made with other settings."""
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        if state["settings"] != self.settings:
            got, old = self.settings, state["settings"]
            raise ValueError(f"{self.file} was begun with {old}, got {got}: use the same, or another --work")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.losses, self.seconds = state["losses"], state["seconds"]

    def step(self, loss: Tensor) -> None:
        """One update of the weights and of their average."""
        number = len(self.losses)
        factor, recipe = learning_rate_factor(number, self.job.recipe), self.job.recipe
        loss.backward()
        for optimizer, lr in ((self.muon, recipe.lr), (self.adam, recipe.adam_lr)):
            optimizer.param_groups[0]["lr"] = factor * lr
            optimizer.step()
            optimizer.zero_grad()
        update_ema(self.ema, self.model, number, self.job.recipe.ema)
        self.losses.append(loss.detach())  # read later: to read it now would make the device wait

    def run(
        self, loss_of: Callable[[nn.Module, int, Generator], Tensor], sheet: Callable[[], np.ndarray] | None = None
    ) -> None:
        """Step until the end, saving now and then, with a picture of samples where `sheet` makes one.

        Raises SystemExit at the deadline, FloatingPointError on NaN.
        """
        job, steps, clock = self.job, self.job.recipe.steps, time.monotonic()
        fast = has_fast_bfloat16(job.device)
        with tqdm(initial=len(self.losses), total=steps, desc=self.name, unit="step") as bar:
            while (number := len(self.losses)) < steps:
                with torch.autocast(job.device.type, torch.bfloat16, enabled=fast):
                    loss = loss_of(self.model, number, np.random.default_rng((job.seed, number)))
                self.step(loss)
                bar.update()
                done, late = number + 1 == steps, time.monotonic() > job.deadline
                if number % 20 == 0 or done or late:
                    self.losses = [float(loss) for loss in self.losses]
                    bar.set_postfix(loss=f"{np.mean(self.losses[-100:]):.4f}")
                    if not math.isfinite(self.losses[-1]):
                        raise FloatingPointError(f"the loss of {self.name} is not finite at step {number}: lower lr")
                    if done or late or time.monotonic() - clock > SAVE_EVERY:
                        clock, self.seconds = time.monotonic(), self.seconds + time.monotonic() - clock
                        self.save()
                        draw_curve(self.losses).save(job.work / f"{self.name}-loss.png")
                        if sheet:
                            Image.fromarray(sheet()).save(job.work / f"{self.name}-samples.png")
                if late and not done:
                    raise SystemExit(f"paused after step {number + 1} of {steps}: the same command goes on")

    def report(self, **facts) -> None:
        """Write down how this stage went, in the checkpoint's training.json and README.md."""
        device = torch.get_device_module(self.job.device)
        name = getattr(device, "get_device_name", platform.machine)()
        record = {"command": self.job.command, "machine": f"{name}, {os.cpu_count()} CPU cores"}
        record |= {"minutes of training": round(self.seconds / 60, 1), **self.settings}
        record |= {"final loss": round(float(np.mean(self.losses[-100:])), 4), **facts}
        print(f"wrote {self.job.folder}:", record)
        file = self.job.folder / "training.json"
        records = json.loads(file.read_text("utf-8")) if file.exists() else {}
        records[self.name] = record
        file.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
        (self.job.folder / "README.md").write_text(readme(self.job.folder, records), encoding="utf-8")


def draw_curve(losses: list[float], size: tuple[int, int] = (720, 360)) -> Image.Image:
    """The loss over the steps, on a logarithmic scale; each point is the mean of its share of the steps."""
    means = np.array([part.mean() for part in np.array_split(np.log10(losses), min(len(losses), 300))])
    low, high = means.min(), max(means.max(), means.min() + 1e-6)
    x = np.linspace(70, size[0] - 15, len(means))
    y = 15 + (size[1] - 50) * (high - means) / (high - low)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for level in np.linspace(low, high, 5):
        height = 15 + (size[1] - 50) * (high - level) / (high - low)
        draw.line([70, height, size[0] - 15, height], fill="lightgray")
        draw.text((10, height - 6), f"{10**level:.4f}", fill="black")
    draw.line(list(zip(x.tolist(), y.tolist())), fill="navy", width=2)
    draw.text((size[0] // 2 - 40, size[1] - 20), f"{len(losses)} steps", fill="black")
    return image


def replace_file(file: Path, write: Callable) -> None:
    """Write a file so that it is there whole or not at all."""
    part = file.with_name(f"part-{file.name}")
    with part.open("wb") as stream:
        write(stream)
    part.replace(file)


def readme(folder: Path, records: dict[str, dict]) -> str:
    """The checkpoint's README: how each part was made, and the hash of each file."""
    lines = ["# A tiny Wan 2.1", "", "Trained on the synthetic clips of `wan_mini/tiny/world.py`; stored as float16."]
    for name, record in records.items():
        lines += ["", f"## {name}", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in record.items()]
    lines += ["", "## Files", "", "| file | bytes | sha256 |", "|---|---|---|"]
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "README.md"):
        lines.append(f"| {file.relative_to(folder).as_posix()} | {file.stat().st_size} | `{sha256_file(file)}` |")
    return "\n".join(lines) + "\n"
