"""How well motion is transferred, against the true tracks of held-out clips of the tiny world.

    python -m benchmarks.evaluate --clips 8 --methods none,dense,fastvmt --csv results.csv
    python -m benchmarks.evaluate --split train --methods fastvmt --vary block=2 "tau=5 window=7"
    torchrun --nproc-per-node 8 -m benchmarks.evaluate --clips 50       # each process takes the next clip

Each clip gets a prompt that differs from it in shapes, colors and background. Each method makes a video of it from the
same noise, with the checkpoint's own settings (motion.json) but for what METHODS or --vary change. Hyperparameters are
tuned on clips of the training split, as in the second command. A clip that fails is named, and the others go on.
"""

import csv
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import fastvmt
from wan_mini.device.select import DTYPES, device_of_process, pick_dtype
from wan_mini.errors import UserError
from wan_mini.load import load_wan
from wan_mini.runs.cli import Parser, parse_pairs, run, with_options
from wan_mini.runs.jobs import JobQueue
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.world import (
    FRAMES,
    KINDS,
    SPLITS,
    Clip,
    classify_scene,
    label_pixels,
    make_clip,
    other_scene,
    score,
)

COLUMNS = (
    "clip",
    "kind",
    "method",
    "correlation",
    "error_px",
    "direction",
    "fidelity",
    "color_ok",
    "background_ok",
    "shape_ok",
    "leak",
    "gradients",
    "seconds",
)
SHOWN = (*COLUMNS[3:7], "published", *COLUMNS[7:])  # published: the flawed form of fidelity, for comparison only
METHODS: dict[str, dict[str, Any]] = {  # what each changes in the checkpoint's MotionConfig
    "none": {"amf": "none"},
    "dense": {"amf": "dense"},
    "fastvmt": {},
    "interval1": {"interval": 1},
    "flow_only": {"weights": (5.0, 0.0)},
    "noised": {"reference": "noised"},
    "dense_noised": {"amf": "dense", "reference": "noised"},
    "dense1": {"amf": "dense", "interval": 1},
    "noised_anchor": {"window_anchor": "noised", "reference": "noised"},
    "self_anchor": {"window_anchor": "self"},
    "self_anchor_soft": {"window_anchor": "self", "centroid": "soft"},
}
RESAMPLINGS = 2000  # of the bootstrap
Generate = Callable[[Clip, str, str, int], tuple[np.ndarray, int]]  # clip, prompt, method, seed -> frames, gradients
Row = dict[str, Any]


def clip_seeds(seed: int, count: int) -> list[tuple[int, str]]:
    """Seed and kind of `count` clips, the kinds in turn: any integer `seed` gives other ones."""
    numbers = np.random.default_rng(seed % 2**64).integers(2**31, size=count)
    seeds = []
    for index, number in enumerate(numbers):
        seeds.append((int(number), KINDS[index % len(KINDS)]))
    return seeds


def classifier_accuracy(seed: int, count: int, split: str = "held-out") -> Iterator[Row]:
    """What the attribute classifier reads off real clips, right or not: the error of the measurement itself."""
    for number, kind in tqdm(clip_seeds(seed, count), desc="classifier", unit="clip"):
        clip = make_clip(number, kind, split, range(0, FRAMES, 8))
        _, right = classify_scene(clip.frames, label_pixels(clip.frames), clip)
        yield {"kind": kind, "method": "real clips", **right}


def evaluate(
    generate: Generate, methods: Sequence[str], clips: Sequence[tuple[int, str]], split: str = "held-out"
) -> Iterator[Row]:
    """One row for each clip and method; a clip's number is its seed, which makes it again (clip_seeds)."""
    for number, kind in clips:
        clip = make_clip(number, kind, split)
        scene = other_scene(clip, number)
        for method in methods:
            start = time.perf_counter()
            frames, gradients = generate(clip, scene.caption, method, number)
            seconds = time.perf_counter() - start
            row = {"clip": number, "kind": kind, "method": method}
            row.update(score(frames, clip, scene))
            row.update(gradients=gradients, seconds=seconds)
            yield row


def mean_with_interval(values: np.ndarray) -> str:
    """Mean of values (clips,) and half the width of its 95 % interval, between quantiles of a bootstrap over clips.

    NaN, where a measure is not defined, does not count; one clip has no interval. Each call draws from the same seed,
    so none depends on others.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return "-"
    if len(values) == 1:
        return f"{values.mean():.2f}"
    low, high = bootstrap_interval(values)
    return f"{values.mean():.2f} ±{(high - low) / 2:.2f}"


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of values (clips,), none of them NaN, between quantiles of a bootstrap."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLINGS, len(values)))
    means = values[drawn].mean(1)  # (resamplings,clips) -> (resamplings,)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def table(rows: Sequence[Row], names: Sequence[str] = SHOWN) -> str:
    """Means of each kind and method with 95 % intervals (`mean_with_interval`), as lines of text."""
    groups: dict[tuple[str, str], list[Row]] = {}
    methods = []
    for row in rows:
        if row["method"] not in methods:
            methods.append(row["method"])
        for kind in (row["kind"], "all"):
            groups.setdefault((kind, row["method"]), []).append(row)
    lines = [["kind", "method", "clips", *names]]
    for kind in (*KINDS, "all"):
        for method in methods:
            group = groups.get((kind, method), [])
            if group:
                line = [kind, method, str(len(group))]
                for name in names:
                    values = np.array([row[name] for row in group], dtype=float)
                    line.append(mean_with_interval(values))
                lines.append(line)
    return _align(lines)


def _align(lines: list[list[str]]) -> str:
    """Cells of equally long lines, padded to columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        cells = map(str.ljust, line, widths)
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


def start_csv(path: Path | None) -> None:
    """A new CSV file without rows."""
    if path is not None:
        with path.open("x", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writeheader()


def write_rows(rows: Iterable[Row], path: Path | None) -> list[Row]:
    """Collect rows; each is appended to the CSV file as soon as it is there, so that a stopped run keeps its own."""
    done = []
    for row in rows:
        done.append(row)
        if path is not None:
            cells = {}
            for name, value in row.items():
                cells[name] = _cell(value)
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS, extrasaction="ignore").writerow(cells)
    return done


def _cell(value: Any) -> Any:
    """A value as the CSV has it: 0 or 1 for a truth, four digits for a number."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return f"{value:.4f}"
    return value


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m benchmarks.evaluate", description="Measure motion transfer against true tracks.")
    p.add_argument("--model", type=Path, default=CHECKPOINT, help="folder with a motion.json (the tiny model)")
    p.add_argument("--split", choices=SPLITS, default="held-out", help="of the world's clips (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="any integer: which of them (%(default)s)")
    p.add_argument("--clips", type=int, default=8, help="how many, of the four kinds in turn (%(default)s)")
    p.add_argument("--methods", default="none,dense,fastvmt", help=f"some of {','.join(METHODS)} (%(default)s)")
    p.add_argument(
        "--vary", nargs="+", default=[], metavar="OPTIONS", help='more methods: fastvmt with options, "tau=5 window=7"'
    )
    p.add_argument("--csv", type=Path, help="one row a clip and method")
    p.add_argument("--classifier-clips", type=int, default=100, help="real clips for the classifier (%(default)s)")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=list(DTYPES), help="bfloat16 where native, else float32")
    return p


def program(argv: list[str] | None = None) -> int:
    """The classifier on real clips, then all methods on other ones. Returns 1 if a clip failed, else 0."""
    args = parser().parse_args(argv)
    names = args.methods.split(",")
    if not set(names) <= METHODS.keys():
        raise UserError(f"got --methods {args.methods}: choose from {','.join(METHODS)}")
    if args.clips < 1 or args.classifier_clips < 1:
        raise UserError(f"got --clips {args.clips}, --classifier-clips {args.classifier_clips}: give at least 1 each")
    if args.csv is not None and args.csv.exists():
        raise UserError(f"{args.csv} exists already: choose another --csv")
    _, preset = load_preset(args.model, fastvmt.MotionConfig())
    configs = {}
    for name in names:
        configs[name] = replace(preset, **METHODS[name])
    for options in args.vary:
        configs[options] = with_options(preset, parse_pairs(options.split(), "--vary"), "--vary")
    device = device_of_process(args.device)
    wan = load_wan(args.model, device=device, dtype=pick_dtype(device, args.dtype))

    def generate(clip: Clip, prompt: str, method: str, seed: int) -> tuple[np.ndarray, int]:
        result = fastvmt.transfer(wan, clip.frames, prompt, configs[method], seed=seed, device=device)
        assert result.frames is not None  # a transfer ends with its frames; only its callback sees none
        return result.frames, result.report["gradients"]

    clips = clip_seeds(args.seed, args.clips)
    rows: list[Row] = []

    def measure(clip: tuple[int, str]) -> None:
        rows.extend(write_rows(evaluate(generate, list(configs), [clip], args.split), args.csv))

    def introduce() -> None:
        print(f"{args.clips} {args.split} clips of seed {args.seed}, {wan.name} on {device}, torch {torch.__version__}")
        accuracy = list(classifier_accuracy(args.seed, args.classifier_clips, args.split))
        print("the attribute classifier on real clips")
        print(table(accuracy, ("color_ok", "background_ok", "shape_ok")))
        start_csv(args.csv)

    queue = JobQueue()
    queue.begin(introduce)
    queue.run(measure, clips, [f"clip {number}" for number, _ in clips], tracebacks=False)
    failed, results = queue.finish(json.dumps(rows, default=float))
    if queue.rank == 0:
        print("motion transfer")
        print(table([row for result in results for row in json.loads(result)]))
    return failed


if __name__ == "__main__":
    raise SystemExit(run(program))
