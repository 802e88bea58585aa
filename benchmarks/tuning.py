"""Options of the methods that train, tried on training clips: what those of wan_mini/peers/presets.py were chosen by.

    python -m benchmarks.tuning --clips 4
    python -m benchmarks.tuning --clips 16 --only "motiondirector: motion alone"
    python -m benchmarks.tuning --show

A candidate is trained once on each clip, and then makes a video at each of its strengths, to another prompt and from
the clip's own noise. A row of the CSV is one clip and video; a stopped run goes on. Clips of other splits are never
used, so that the table of methods, which is made on held-out clips, stays one.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.evaluate import clip_seeds
from benchmarks.metrics.flags import add_clip_flags
from benchmarks.metrics.rows import Row, append_rows, check_settings, mean_cell, read_rows
from benchmarks.table1 import settings_of
from wan_mini.device.select import pick_device, pick_dtype
from wan_mini.errors import UserError, check_range
from wan_mini.load import Wan, load_wan
from wan_mini.peers import adapted, presets
from wan_mini.peers.methods import METHODS
from wan_mini.runs.cli import Parser, run
from wan_mini.tiny.world import Clip, make_clip, other_scene, score

RESULTS = Path(__file__).parent / "results" / "tuning.csv"
MEASURES = ("correlation", "error_px", "color_ok", "shape_ok", "background_ok", "leak", "seconds")
STRENGTHS = (0.7, 1.0, 1.5)


@dataclass(frozen=True)
class Candidate:
    """A method with other options than its preset's, and the strengths of what it trains."""

    method: str
    changes: dict[str, Any]
    strengths: tuple[float, ...] = STRENGTHS


CANDIDATES = {
    "fym: preset": Candidate("fym", {}, (1.0, 1.5, 2.0)),
    "fym: all heads": Candidate("fym", {"heads": "all"}),
    "fym: all heads, no spatial stage, dense": Candidate(
        "fym", {"heads": "all", "fit_steps": (0, 200), "sparse": "none"}
    ),
    "fym: spatial heads, no spatial stage": Candidate("fym", {"heads": "swapped", "fit_steps": (0, 200)}),
    "motiondirector: with spatial passes": Candidate("motiondirector", {"spatial_share": 0.8}, (0.7, 1.0, 1.5, 2.0)),
    "motiondirector: motion alone": Candidate("motiondirector", {"spatial_share": 0.0}),
    "motioninversion: debiased, as trained": Candidate(
        "motioninversion", {"debiased": True, "difference": False}, (0.3, 0.5, 0.7, 1.0)
    ),
    "det: ten times the rate": Candidate("det", {"fit_lr": (0.0, 1e-2)}),
}


def options_of(candidate: Candidate, folder: Path, strength: float) -> Any:
    """The method's options for the checkpoint in this folder; strength: of what it has trained."""
    _, preset = presets.load_preset(folder, METHODS[candidate.method].config, candidate.method)
    config: Any = replace(preset, **candidate.changes)
    if hasattr(config, "strengths"):  # of the spatial adapters, which make no video, and the temporal ones
        return replace(config, strengths=(0.0, strength))
    return replace(config, adapter_strength=strength)


def rows_of(
    wan: Wan, folder: Path, names: Sequence[str], clips: Sequence[tuple[int, str]], done: set[tuple[str, str]]
) -> Iterator[Row]:
    """One row for each clip, candidate and strength that is not in `done` ({(clip, row's method)}), clip by clip."""
    for number, kind in clips:
        clip = make_clip(number, kind, "train")
        for name in names:
            candidate = CANDIDATES[name]
            missing = [x for x in candidate.strengths if (str(number), row_name(name, x)) not in done]
            with tempfile.TemporaryDirectory() as kept:
                for strength in missing:
                    config = options_of(candidate, folder, strength)
                    head = {"clip": str(number), "kind": kind, "method": row_name(name, strength)}
                    measures = video_row(wan, clip, config, number, Path(kept) / "adapters.safetensors")
                    yield {**head, "settings": settings_of(config, wan.hashes), **measures}


def row_name(candidate: str, strength: float) -> str:
    """What a row of the CSV has for its method."""
    return f"{candidate}, x {strength:g}"


def video_row(wan: Wan, clip: Clip, config: Any, seed: int, adapters: Path) -> Row:
    """Make a video with these adapters, which are trained first unless the file is there, and measure it."""
    scene = other_scene(clip, seed)
    trained = adapters.exists()
    start = time.perf_counter()
    result = adapted.transfer(
        wan,
        clip.frames,
        scene.caption,
        config,
        ref_prompt=clip.caption,
        seed=seed,
        save=None if trained else adapters,
        load=adapters if trained else None,
    )
    assert result.frames is not None  # a run ends with its frames
    return {**score(result.frames, clip, scene), "seconds": time.perf_counter() - start}


def table(rows: Sequence[Row]) -> str:
    """Means over clips with half of a 95 % interval, in Markdown, best correlation first."""
    names = dict.fromkeys(row["method"] for row in rows)
    lines = []
    for name in names:
        group = [row for row in rows if row["method"] == name]
        mean = sum(row["correlation"] for row in group) / len(group)
        cells = [name, str(len(group)), *(mean_cell(group, measure) for measure in MEASURES)]
        lines.append((-mean, "| " + " | ".join(cells) + " |"))
    head = ["| candidate | clips | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    return "\n".join([*head, *(line for _, line in sorted(lines))])


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m benchmarks.tuning", description="Options of the methods that train, on training clips.")
    add_clip_flags(p, RESULTS, clips=4, seed=3)
    p.add_argument("--only", nargs="+", metavar="NAME", help="some candidates (all)")
    return p


def run_missing(args: Namespace, names: Sequence[str]) -> None:
    """Append the rows that the CSV lacks. Raises UserError if it has rows of these names with other options."""
    device = pick_device(args.device)
    wan = load_wan(args.model, device=device, dtype=pick_dtype(device, args.dtype))
    settings = {}
    for name in names:
        for strength in CANDIDATES[name].strengths:
            config = options_of(CANDIDATES[name], args.model, strength)
            settings[row_name(name, strength)] = settings_of(config, wan.hashes)
    rows = read_rows(args.csv, MEASURES)
    check_settings(rows, settings, args.csv)
    done = {(row["clip"], row["method"]) for row in rows}
    append_rows(rows_of(wan, args.model, names, clip_seeds(args.seed, args.clips), done), args.csv, MEASURES)


def program(argv: list[str] | None = None) -> None:
    """Run what the CSV lacks, and print the table."""
    args = parser().parse_args(argv)
    check_range("clips", args.clips, 1)
    names = args.only or list(CANDIDATES)
    unknown = sorted(set(names) - CANDIDATES.keys())
    if unknown:
        raise UserError(f"got --only {', '.join(unknown)}: choose from {'; '.join(CANDIDATES)}")
    if not args.show:
        run_missing(args, names)
    print(table(read_rows(args.csv, MEASURES)))


if __name__ == "__main__":
    raise SystemExit(run(program))
