"""Settings of the method, side by side on the same clips: what the frontier and the studies share.

A row of the CSV is one clip at one point, from the clip's own noise. A stopped run goes on; differences between points
are paired, clip by clip.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import fastvmt
from benchmarks.evaluate import clip_seeds
from benchmarks.metrics.energy import EnergyMeter
from benchmarks.metrics.flags import add_clip_flags
from benchmarks.metrics.rows import Row, append_rows, check_settings, read_rows, values_of
from benchmarks.metrics.world import quality
from benchmarks.table1 import settings_of
from wan_mini.device.select import pick_device, pick_dtype
from wan_mini.errors import UserError
from wan_mini.load import Wan, load_wan
from wan_mini.pipeline import Transfer
from wan_mini.runs.cli import Parser
from wan_mini.tiny.world import SPLITS, Clip, make_clip, other_scene, score

QUALITY = ("correlation", "error_px", "subject", "shape_ok", "color_ok")
COSTS = ("gradients", "passes", "guidance_gflop", "denoising_gflop", "seconds", "joules")
MEASURES = (*QUALITY, *COSTS)
MakeClip = Callable[[int, str, str], Clip]  # seed, kind and split, as make_clip


@dataclass(frozen=True)
class Point:
    """One setting: options, and the clips that it is tried on."""

    config: fastvmt.MotionConfig
    clip_of: MakeClip = make_clip
    clip_name: str = ""  # of clip_of, if it is another; rows of other clips must not be averaged
    scored: int | None = None  # frames, from the first, that are compared with the truth; None: all
    base: str = ""  # the point that it is compared with; "": the study's
    scale: int = 1  # the reference is enlarged by this, and the result made as small as the truth again
    transfer: Callable[..., Transfer] | None = None  # None: fastvmt.transfer


def point_row(wan: Wan, point: Point, clip: Clip, seed: int) -> Row:
    """Transfer a clip's motion, and measure the result and its cost."""
    scene = other_scene(clip, seed)
    reference = clip.frames.repeat(point.scale, axis=1).repeat(point.scale, axis=2)
    meter = EnergyMeter()
    start = time.perf_counter()
    transfer = point.transfer or fastvmt.transfer
    result = transfer(wan, reference, scene.caption, point.config, seed=seed)
    seconds = time.perf_counter() - start
    joules = meter.joules()
    assert result.frames is not None  # a run ends with its frames
    report = result.report
    flops = report["flops"]
    frames = reduced(result.frames, point.scale)[: point.scored]
    truth = first_frames(clip, point.scored)
    return {
        **score(frames, truth, scene),
        **quality(frames, truth, scene),
        "joules": joules,
        "gradients": report["gradients"],
        "passes": sum(report["passes"]),
        "guidance_gflop": (flops["guidance"] + flops["flow"]) / 1e9,
        "denoising_gflop": flops["denoising"] / 1e9,
        "seconds": seconds,
    }


def reduced(frames: np.ndarray, scale: int) -> np.ndarray:
    """Frames (T,scale*H,scale*W,3) uint8, each square of pixels averaged -> (T,H,W,3)."""
    if scale == 1:
        return frames
    count, height, width, _ = frames.shape
    squares = frames.reshape(count, height // scale, scale, width // scale, scale, 3)
    return squares.mean((2, 4)).round().astype(np.uint8)  # -> (T,H,W,3)


def first_frames(clip: Clip, count: int | None) -> Clip:
    """A clip's first frames, with their truth."""
    return replace(clip, frames=clip.frames[:count], tracks=clip.tracks[:, :count], visible=clip.visible[:, :count])


def settings_of_point(point: Point, hashes: Mapping[str, str]) -> str:
    """Eight letters that differ if options, clips or weights do."""
    clips = f"{point.clip_name} {point.scored} {point.scale}"
    return settings_of(point.config, {**hashes, "clips": clips})


def rows_of(
    wan: Wan, points: Mapping[str, Point], clips: Sequence[tuple[int, str]], split: str, done: set[tuple[str, str]]
) -> Iterator[Row]:
    """One row for each clip and point that is not in `done` ({(clip, point)}), clip by clip."""
    for number, kind in clips:
        for name, point in points.items():
            if (str(number), name) in done:
                continue
            clip = point.clip_of(number, kind, split)
            settings = settings_of_point(point, wan.hashes)
            head = {"clip": str(number), "kind": kind, "method": name, "settings": settings}
            yield {**head, **point_row(wan, point, clip, number)}


def add_flags(p: Parser, results: Path, clips: int) -> None:
    """The flags of a program that runs points."""
    add_clip_flags(p, results, clips=clips)
    p.add_argument("--split", choices=SPLITS, default="held-out", help="of the world's clips (%(default)s)")
    p.add_argument("--points", nargs="+", metavar="NAME", help="some of them (all)")


def run_points(args: Any, points: Mapping[str, Point]) -> list[Row]:
    """Run what the CSV lacks of the points that the flags ask for; all its rows.

    Raises UserError on a point that is not there, and on rows of other options, clips or weights.
    """
    names = args.points or list(points)
    unknown = sorted(set(names) - points.keys())
    if unknown or args.clips < 1:
        got = f"got --points {', '.join(unknown)}" if unknown else f"got --clips {args.clips}"
        raise UserError(f"{got}: choose from {'; '.join(points)}; at least 1 clip")
    rows = read_rows(args.csv, MEASURES)
    if args.show:
        return rows
    device = pick_device(args.device)
    wan = load_wan(args.model, device=device, dtype=pick_dtype(device, args.dtype))
    settings = {name: settings_of_point(point, wan.hashes) for name, point in points.items()}
    check_settings(rows, settings, args.csv)
    done = {(row["clip"], row["method"]) for row in rows}
    chosen = {name: points[name] for name in names}
    append_rows(rows_of(wan, chosen, clip_seeds(args.seed, args.clips), args.split, done), args.csv, MEASURES)
    return read_rows(args.csv, MEASURES)


def mean_text(rows: Sequence[Row], name: str, measure: str) -> str:
    """The mean of a measure at one point; a dash where nothing was measured."""
    values = list(values_of(rows, name, measure).values())
    return f"{np.mean(values):.2f}" if values else "-"
