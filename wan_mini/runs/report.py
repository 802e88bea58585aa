"""A page for a run, report.html: one file, which asks nothing of a network and whose policy forbids it to."""

import base64
import io
import json
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from wan_mini.config import TIME_STRIDE, TOKEN_SIZE, token_grid
from wan_mini.files import write_bytes
from wan_mini.runs.folder import ARROW_TILE, public_label
from wan_mini.runs.preview import tile_moves

TEMPLATE = Path(__file__).with_name("report.html")
SHOWN_APART = ("stages", "losses", "key_gradient_norms")  # of a record


def write_report(path: Path, panels: Mapping[str, tuple[np.ndarray, Tensor | None]], record: Mapping[str, Any]) -> Path:
    """Write the page of a run whole; returns its path.

    panels: {"reference": ..., "result": ..., ...}, frames (T,H,W,3) uint8 and their motion flow (F-1,S,2), if any, in
    tokens. record: the run's settings, and of its costs, versions and hashes what is known.
    """
    label = public_label(record)
    clips = [clip_data(name, *panel) for name, panel in panels.items()]
    fields = {
        "title": escape(str(label.get("prompt") or "A video without a prompt")),
        "summary": escape(f"{label.get('model')}, seed {label.get('seed')}, {label.get('program')}"),
        "losses": loss_plot(label.get("losses") or []),
        "stages": stage_table(label.get("stages") or {}),
        "command": escape(command_of(label)),
        "settings": "".join(setting_rows("", label)),
        "clips": json.dumps(clips).replace("<", "\\u003c"),
        "fps": f"{float(label.get('clip', label)['fps']):g}",
        "stride": str(TIME_STRIDE),
    }
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields)
    write_bytes(path, page.encode("utf-8", "backslashreplace"))
    return path


def clip_data(name: str, frames: np.ndarray, flow: Tensor | None) -> dict[str, Any]:
    """A clip for the page's script: frames as WebP in base64, and for each latent frame the arrows [x, y, dx, dy]."""
    _, rows, columns = token_grid(*frames.shape[:3])
    arrows = []
    if flow is not None:
        for displacement in flow.detach().cpu().float().unflatten(1, (rows, columns)):  # (F-1,S,2) -> (H,W,2)
            moves = tile_moves(displacement, ARROW_TILE, TOKEN_SIZE)
            arrows.append([[round(number, 1) for number in (*center, *move)] for center, move in moves])
    pictures = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "WEBP", quality=80, method=2)
        pictures.append(base64.b64encode(file.getvalue()).decode())
    size = {"height": frames.shape[1], "width": frames.shape[2], "token": TOKEN_SIZE}
    return {"name": name, "frames": pictures, "arrows": arrows, **size}


def loss_plot(losses: list[list[float]]) -> str:
    """The loss at every gradient as SVG, one line for each guided step; nothing without guidance."""
    losses = [step for step in losses if step]
    total = sum(len(step) for step in losses)
    if total == 0:
        return ""
    top = max(max(step) for step in losses) or 1.0
    marks = f'<path d="M40 40V160H560" fill="none" stroke="#888"/><text x="40" y="32">{top:.4g}</text>'
    marks += f'<text x="40" y="188">{total} gradients, a line for each guided step or training, from 0</text>'
    number = 0
    for step in losses:
        points = ""
        for loss in step:
            x = 40 + 520 * number / max(total - 1, 1)
            y = 160 - 120 * loss / top
            points += f"{x:.1f},{y:.1f} "
            marks += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{loss:.4g}</title></circle>'
            number += 1
        marks += f'<polyline points="{points}"/>'
    label = f"loss at {total} gradients, from {losses[0][0]:.4g} to {losses[-1][-1]:.4g}"
    return f'<h2>Loss</h2><svg viewBox="0 0 600 200" role="img" aria-label="{label}">{marks}</svg>'


def stage_table(stages: Mapping[str, Mapping[str, float | None]]) -> str:
    """Seconds and peak memory of each stage, and a bar for its share of the longest; nothing if nobody knows."""
    if not stages:
        return ""
    rows = "<h2>Seconds and memory</h2><table><tr><th>stage<th>seconds<th>peak GB<th></tr>"
    longest = max(cost["seconds"] or 0.0 for cost in stages.values()) or 1.0
    for name, cost in stages.items():
        seconds = cost["seconds"] or 0.0
        peak = "-" if cost["peak_gb"] is None else f"{cost['peak_gb']:.3f}"
        rows += f'<tr><td>{escape(name)}<td class="number">{seconds:.1f}<td class="number">{peak}'
        rows += f'<td><span class="bar" style="width: {10 * seconds / longest:.2f}em"></span></tr>\n'
    return f"{rows}</table>"


def setting_rows(prefix: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Rows of a table with every setting, those of an object inside under "object.name"."""
    for name, value in values.items():
        if isinstance(value, Mapping) and name not in SHOWN_APART:
            yield from setting_rows(f"{prefix}{name}.", value)
        elif name not in SHOWN_APART:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f'<tr><td>{escape(prefix + name)}<td class="value">{escape(text)}</tr>\n'


def command_of(settings: Mapping[str, Any]) -> str:
    """The command line that makes a run of these settings again."""
    words = ["python", *str(settings.get("program", "fastvmt.py")).split()]
    for name in ("model", "ref", "prompt", "seed", "device", "dtype"):
        if name in settings:
            words += [f"--{name}", str(settings[name]).removeprefix("torch.")]
    for lora in settings.get("loras", []):
        words += ["--lora", str(lora)]
    if settings.get("label"):
        words += ["--label", str(settings["label"])]
    if "clip" not in settings:  # text to video has a flag for each option
        for name in ("height", "width", "frames", "steps", "sampler", "shift", "cfg", "negative", "vae_tile", "key"):
            if settings.get(name) is not None:
                words += [f"--{name.replace('_', '-')}", str(settings[name])]
        return shlex.join(words)
    words.append("--set")
    for name, value in {**settings["clip"], **settings.get("config", {})}.items():
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        words.append(f"{name}={text}")
    return shlex.join(words)
