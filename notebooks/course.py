"""What all notebooks share: source code on show, time and memory of a call, figures, small films, exercises."""

import inspect
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image as Shown
from PIL import Image

from wan_mini.runs.preview import side_by_side

ROOT = Path(__file__).resolve().parent.parent

plt.rcParams |= {
    "figure.dpi": 160,  # readable on a projector
    "font.size": 10,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Colors that color-blind readers can tell apart (Okabe and Ito), and a dash for each, for print.
    "axes.prop_cycle": plt.cycler(color=["black", "#0072b2", "#d55e00", "#009e73"], linestyle=["-", "--", "-.", ":"]),
}


def source(*objects: Any) -> None:
    """Print the code of functions or classes, as it stands in the modules."""
    for thing in objects:
        file = Path(inspect.getsourcefile(thing)).resolve()
        print(f"# {file.relative_to(ROOT).as_posix()}")
        print(inspect.getsource(thing))


def measure(call: Callable[[], Any], repeats: int = 3) -> tuple[float, float]:
    """Median seconds of a call after a first one, and the most memory that its tensors held at once, in MB."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return float(np.median(seconds)), float(np.max(np.cumsum([0, *changes]))) / 1e6


def compare(calls: dict[str, Callable[[], Any]], repeats: int = 3) -> dict[str, tuple[float, float]]:
    """Print time and memory of several ways to the same thing, side by side, and their ratio to the first."""
    costs = {name: measure(call, repeats) for name, call in calls.items()}
    first, _ = next(iter(costs.values()))
    for name, (seconds, megabytes) in costs.items():
        print(f"{name:24} {1000 * seconds:10.2f} ms {seconds / first:8.3f} x {megabytes:9.2f} MB")
    return costs


def film(clips: dict[str, np.ndarray], fps: float = 16, every: int = 2, colors: int = 64) -> Shown:
    """Show clips (T,H,W,3) uint8 side by side, each under its name, as an animated GIF (GitHub shows no WebP).

    One frame in `every` is shown: 17 of a clip of 33. About 100 kB for 17 frames of 128x384; fewer colors make it
    smaller. (Pillow's usual way of choosing them goes by area, and would give a small red disc the color of something
    else.)
    """
    palette = {"method": Image.Quantize.FASTOCTREE, "dither": Image.Dither.NONE}
    pictures = [Image.fromarray(frame).quantize(colors, **palette) for frame in side_by_side(clips)[::every]]
    data = io.BytesIO()
    options = {"append_images": pictures[1:], "duration": round(1000 * every / fps), "loop": 0}
    pictures[0].save(data, "GIF", save_all=True, **options)
    return Shown(data.getvalue(), format="gif")
