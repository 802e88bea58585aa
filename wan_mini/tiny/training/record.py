"""How a checkpoint was made: training.json, which each stage adds to, and README.md, made from it."""

import hashlib
import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from wan_mini.errors import UserError
from wan_mini.tiny.training.trainer import Trainer

FIRST = 200  # steps whose losses are kept, for who runs the recipe again
EVERY = 100  # steps of which one mean loss is kept
FILE = "training.json"
HEADER = """# A tiny Wan 2.1

Trained on synthetic clips (`wan_mini/tiny/world`) by the commands below; stored as float16.
"""


def read_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """The stages that trained a checkpoint folder, by name, with their figures; without, if they go on."""
    file = folder / FILE
    stages: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return stages


def claim(folder: Path, stage: str) -> None:
    """Note in training.json that a stage of the DiT begins or goes on here.

    Raises UserError if another one has begun here: each would replace the weights of the other.
    """
    stages = read_stages(folder)
    others = sorted(stages.keys() - {"vae", stage})
    if others:
        raise UserError(f"{folder} has the DiT of {others[0]}: use another --folder, with a copy of its VAE")
    folder.mkdir(parents=True, exist_ok=True)
    write_stages(folder, {**stages, stage: stages.get(stage, {})})


def write_stages(folder: Path, stages: dict[str, dict[str, Any]]) -> None:
    """Write training.json."""
    (folder / FILE).write_text(json.dumps(stages, indent=1) + "\n", encoding="utf-8")


def record(trainer: Trainer, figures: dict[str, Any]) -> None:
    """Add a finished stage and its figures to training.json, and write README.md anew."""
    folder = trainer.job.folder
    stages = read_stages(folder)
    losses = [entry["loss"] for entry in trainer.losses]
    means = [sum(losses[start : start + EVERY]) / EVERY for start in range(0, len(losses) - EVERY + 1, EVERY)]
    stages[trainer.name] = {
        "command": f"python -m wan_mini.tiny.training {trainer.name} --seed {trainer.job.seed}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {trainer.job.device.type}",
        "torch": torch.__version__,
        "dtype of products": str(trainer.job.dtype).removeprefix("torch."),
        "minutes": round(trainer.seconds / 60, 1),
        "steps": trainer.step,
        **figures,
        "recipe": asdict(trainer.recipe),
        f"losses of the first {FIRST} steps": [round(loss, 5) for loss in losses[:FIRST]],
        f"mean losses of {EVERY} steps": [round(mean, 5) for mean in means],
    }
    write_stages(folder, stages)
    (folder / "README.md").write_text(describe(folder, stages), encoding="utf-8")


def describe(folder: Path, stages: dict[str, dict[str, Any]]) -> str:
    """README.md of a checkpoint folder: a table a stage, and the files with their hashes."""
    lines = [HEADER]
    for name, facts in stages.items():
        lines += [f"## {name}", "", "| | |", "|---|---|"]
        for key, value in facts.items():
            if key != "recipe" and not isinstance(value, list):
                lines.append(f"| {key} | {in_words(value)} |")
        lines.append("")
    lines += [f"Recipes and losses: {FILE}.", "", "## Files", "", "| file | bytes | sha256 |", "|---|---|---|"]
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "README.md":
            data = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            lines.append(f"| {name} | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |")
    return "\n".join(lines) + "\n"


def in_words(value: Any) -> str:
    """A figure for a table: figures with names one after the other, lists without brackets."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {in_words(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(in_words(part) for part in value)
    return str(value)
