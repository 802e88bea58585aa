"""The yardstick: how well motion is transferred, against the true tracks of held-out clips of the tiny world.

    python -m wan_mini.tiny.evaluate --clips 8 --settings none,dense,windowed --csv results.csv
    python -m wan_mini.tiny.evaluate --split train --settings windowed --vary block=2 "tau=5 window=7"

Each clip gets a prompt that differs from it in shapes, colors and background; each setting makes a video of it from
the same noise. Knobs are tuned on clips of the training split, as in the second command. This file knows no method:
--method names a module with `transfer` and `TINY_MOTION`.
"""

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from wan_mini.device.select import DTYPES, pick_device, pick_dtype
from wan_mini.load import load_wan
from wan_mini.runs.cli import Parser, parse_options, run
from wan_mini.tiny.measure import label, read_scene, score
from wan_mini.tiny.world import FRAMES, KINDS, SPLITS, Clip, Scene, make_clip, other_scene

COLUMNS = (
    *("clip", "kind", "setting", "correlation", "error_px", "direction", "fidelity"),
    *("color_ok", "background_ok", "shape_ok", "leak", "gradients", "seconds"),
)
SHOWN = (*COLUMNS[3:7], "published", *COLUMNS[7:])  # published: the flawed form of fidelity, for comparison only
SETTINGS: dict[str, dict[str, Any]] = {  # what each changes in the method's TINY_MOTION
    "none": {"amf": "none"},
    "dense": {"amf": "dense"},
    "windowed": {},
    "interval1": {"interval": 1},
    "flow_only": {"weights": (5.0, 0.0)},
    "noised": {"reference": "noised"},
    "dense_noised": {"amf": "dense", "reference": "noised"},
    "dense1": {"amf": "dense", "interval": 1},
    "ref": {"centers": "ref"},
    "own": {"centers": "own"},
    "soft": {"centers": "own", "center_kind": "soft"},
}
Video = Callable[[Clip, str, str, int], tuple[np.ndarray, int]]  # clip, prompt, setting, seed -> frames, gradients
Row = dict[str, Any]


def clip_seeds(seed: int, count: int) -> list[tuple[int, str]]:
    """Seed and kind of `count` clips, the kinds in turn: any integer `seed` gives other ones."""
    rng = np.random.default_rng(seed % 2**64)
    return [(int(number), KINDS[index % len(KINDS)]) for index, number in enumerate(rng.integers(2**31, size=count))]


def oracle_accuracy(seed: int, count: int, split: str = "held-out") -> Iterator[Row]:
    """What the oracle reads off real clips, right or not: the yardstick's own error."""
    for number, kind in tqdm(clip_seeds(seed, count), desc="oracle", unit="clip"):
        clip = make_clip(number, kind, split, range(0, FRAMES, 8))
        _, right = read_scene(clip.frames, label(clip.frames), clip)
        yield {"kind": kind, "setting": "real clips", **right}


def measure(video: Video, settings: Sequence[str], seed: int, count: int, split: str = "held-out") -> Iterator[Row]:
    """One row for each clip and setting; a clip's number is its seed, which makes it again."""
    for number, kind in clip_seeds(seed, count):
        clip = make_clip(number, kind, split)
        scene: Scene = other_scene(clip, number)
        for setting in settings:
            start = time.perf_counter()
            frames, gradients = video(clip, scene.caption, setting, number)
            cost = {"gradients": gradients, "seconds": time.perf_counter() - start}
            yield {"clip": number, "kind": kind, "setting": setting, **score(frames, clip, scene), **cost}


def table(rows: Sequence[Row], names: Sequence[str] = SHOWN) -> str:
    """Means of each kind and setting with 95 % intervals: half the width between a bootstrap's quantiles.

    2,000 resamplings of the clips, each cell's from the same seed, so that none depends on the others. A clip where a
    measure is not defined does not count in its mean.
    """

    def cell(values: np.ndarray) -> str:
        values = values[~np.isnan(values)]
        if not len(values):
            return "-"
        drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
        means = values[drawn].mean(1)  # (2000,clips) -> (2000,)
        low, high = np.quantile(means, (0.025, 0.975))
        return f"{values.mean():.2f} ±{(high - low) / 2:.2f}"

    lines = [["kind", "setting", "clips", *names]]
    for kind in (*KINDS, "all"):
        for setting in dict.fromkeys(row["setting"] for row in rows):
            some = [row for row in rows if row["setting"] == setting and kind in (row["kind"], "all")]
            if some:
                cells = [cell(np.array([row[name] for row in some], dtype=float)) for name in names]
                lines.append([kind, setting, str(len(some)), *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def write_rows(rows: Iterator[Row], path: Path | None) -> list[Row]:
    """Collect rows, each written to the CSV file as soon as it is there, so that a stopped run keeps its own."""
    if path is None:
        return list(rows)
    done = []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            done.append(row)
            writer.writerow({k: int(v) if isinstance(v, bool) else f"{v:.4f}" if isinstance(v, float) else v
                             for k, v in row.items()})  # fmt: skip
            file.flush()
    return done


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m wan_mini.tiny.evaluate", description="Measure motion transfer against true tracks.")
    p.add_argument("--model", type=Path, default=Path(__file__).parent / "checkpoint", help="folder (the tiny model)")
    p.add_argument("--method", default="fastvmt", help="module with transfer and TINY_MOTION (%(default)s)")
    p.add_argument("--split", choices=SPLITS, default="held-out", help="of the world's clips (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="any integer: which of them (%(default)s)")
    p.add_argument("--clips", type=int, default=8, help="how many, of the four kinds in turn (%(default)s)")
    p.add_argument("--settings", default="none,dense,windowed", help=f"some of {','.join(SETTINGS)} (%(default)s)")
    p.add_argument("--vary", nargs="+", default=[], metavar="KNOBS", help='more settings: knobs, as "tau=5 window=7"')
    p.add_argument("--csv", type=Path, help="one row a clip and setting")
    p.add_argument("--oracle-clips", type=int, default=100, help="real clips to test the oracle on (%(default)s)")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=list(DTYPES), help="bfloat16 where native, else float32")
    return p


def program(argv: list[str] | None = None) -> None:
    """The oracle on real clips, then the method on all settings."""
    args = parser().parse_args(argv)
    names = args.settings.split(",")
    if not set(names) <= SETTINGS.keys() or args.clips < 1 or args.oracle_clips < 1:
        raise ValueError(f"got --settings {args.settings}, --clips {args.clips}, --oracle-clips {args.oracle_clips}: "
                         f"choose from {','.join(SETTINGS)}, and at least one clip of each sort")  # fmt: skip
    device, method = pick_device(args.device), import_module(args.method)
    settings = {name: SETTINGS[name] for name in names}
    settings |= {knobs: parse_options(method.TINY_MOTION, knobs.split(), "--vary") for knobs in args.vary}
    wan = load_wan(args.model, device=device, dtype=pick_dtype(device, args.dtype))

    def video(clip: Clip, prompt: str, setting: str, seed: int) -> tuple[np.ndarray, int]:
        config = replace(method.TINY_MOTION, **settings[setting])
        result = method.transfer(wan, clip.frames, prompt, config, seed=seed, device=device)
        return result.frames, result.report["gradients"]

    print(f"{args.clips} {args.split} clips of seed {args.seed}, {wan.name} on {device}, torch {torch.__version__}")
    accuracy = list(oracle_accuracy(args.seed, args.oracle_clips, args.split))
    print("the oracle on real clips\n" + table(accuracy, ("color_ok", "background_ok", "shape_ok")))
    rows = measure(video, list(settings), args.seed, args.clips, args.split)
    print(args.method + "\n" + table(write_rows(rows, args.csv)))


if __name__ == "__main__":
    raise SystemExit(run(program))
