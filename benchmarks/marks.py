"""How well the start noise of a clip is found again after what happens to videos.

    python -m benchmarks.marks --clips 50 --only-unmarked none first_frame_lost
    python -m benchmarks.marks --show                                          # what has been measured, and its figure

Each held-out clip of the tiny world is transferred twice: from noise with a key, and from noise without. Both results
are distorted in the same ways, and verified for the key. Rows are written as they come; a second call with the same
--csv does only what is missing, and refuses rows of another model or other settings. Lost frames and mirrors are
searched for where a distortion is of that kind.
"""

import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

import fastvmt
from benchmarks.evaluate import clip_seeds
from benchmarks.metrics.distortions import Distortion, distortions
from benchmarks.metrics.strip import strip
from wan_mini.device.select import DTYPES, pick_device, pick_dtype
from wan_mini.errors import UserError, check_range
from wan_mini.files import write_bytes
from wan_mini.load import Wan, load_wan
from wan_mini.runs.cli import Parser, parse_pairs, run, with_options
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.world import make_clip, other_scene
from wan_mini.verify import AS_IT_IS, RATE, VIEWS, Verifier

KEY = "benchmark"
RESULTS = Path(__file__).parent / "results" / "marks.csv"
COLUMNS = (
    "run",
    "clip",
    "kind",
    "marked",
    "distortion",
    "agreement",
    "z",
    "log10_rate",
    "skipped",
    "offset",
    "mirrored",
    "seconds",
)
SEARCHED = ("first_frame_lost", "trimmed", "mirrored")  # with every view; the others as they are
Row = dict[str, Any]


class Transfers:
    """The clips that are marked or not: motion transfers of the world's held-out clips."""

    def __init__(self, wan: Wan, config: fastvmt.MotionConfig, device: torch.device):
        self.wan = wan
        self.config = config
        self.device = device

    def generate(self, number: int, kind: str, marked: bool) -> np.ndarray:
        """The result (T,H,W,3) uint8 for one clip."""
        clip = make_clip(number, kind, "held-out")
        key = KEY if marked else ""
        return self.transfer(clip.frames, other_scene(clip, number).caption, number, key)

    def second_generation(self, frames: np.ndarray, number: int, kind: str) -> np.ndarray:
        """A transfer whose reference is a result, from noise of its own and to another prompt."""
        scene = other_scene(make_clip(number, kind, "held-out"), number + 1)
        return self.transfer(frames, scene.caption, number + 1, "")

    def transfer(self, frames: np.ndarray, prompt: str, seed: int, key: str) -> np.ndarray:
        """One transfer from keyed noise."""
        config = replace(self.config, key=key)
        result = fastvmt.transfer(self.wan, frames, prompt, config, seed=seed, device=self.device)
        assert result.frames is not None  # a transfer ends with its frames; only its callback sees none
        return result.frames


def measure(
    transfers: Transfers, number: int, kind: str, marked: bool, names: Sequence[str], table: dict[str, Distortion]
) -> Iterator[Row]:
    """One row for each of these distortions of one clip."""
    frames = transfers.generate(number, kind, marked)
    for name in names:
        start = time.perf_counter()
        if name == "second_generation":
            distorted = transfers.second_generation(frames, number, kind)
        else:
            distorted = table[name](frames)
        verifier = Verifier(transfers.wan, distorted, frames.shape[:3], transfers.device)
        best, rate = verifier.best([number], KEY, VIEWS if name in SEARCHED else [AS_IT_IS])
        row: Row = {"clip": number, "kind": kind, "marked": int(marked), "distortion": name}
        row |= {"agreement": f"{best.agreement:.4f}", "z": f"{best.z:.2f}", "log10_rate": f"{rate:.2f}"}
        row |= {"skipped": best.view.skipped, "offset": best.offset, "mirrored": int(best.view.mirrored)}
        yield row | {"seconds": f"{time.perf_counter() - start:.1f}"}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV file; the last one may be cut, and counts only if it is whole."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]


def run_of(wan: Wan, config: fastvmt.MotionConfig) -> str:
    """Twelve digits that stand for the weights, the settings and the type of numbers: rows of another are not mixed."""
    text = json.dumps([wan.hashes, asdict(config), str(wan.dtype)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def rewrite(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Put these whole rows in place of a file that may end in a cut one."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def measure_all(
    transfers: Transfers, clips: Sequence[tuple[int, str]], names: dict[bool, Sequence[str]], path: Path, run: str
) -> None:
    """Write what is missing in the CSV file, each row when it is there.

    names: the distortions of marked clips (True) and of unmarked ones. run: run_of, that of all rows.
    """
    rows = read_rows(path)
    if {row.get("run") for row in rows} - {run}:
        raise UserError(f"{path} has rows of another model or other settings: choose another --csv")
    done = {(row["clip"], row["marked"], row["distortion"]) for row in rows}
    table = distortions()
    rewrite(path, rows)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        for index, (number, kind) in enumerate(clips):
            for marked in (True, False):
                missing = [name for name in names[marked] if (str(number), str(int(marked)), name) not in done]
                if not missing:
                    continue
                start = time.perf_counter()
                for row in measure(transfers, number, kind, marked, missing, table):
                    writer.writerow({"run": run, **row})
                    file.flush()
                what = f"clip {index + 1} of {len(clips)}, {'marked' if marked else 'unmarked'}"
                print(f"{what}: {len(missing)} rows in {time.perf_counter() - start:.0f} s", flush=True)


def summary(rows: Sequence[dict[str, str]]) -> str:
    """A line for each distortion: how many clips were found, with the mark and without, and the range of z."""
    lines = [f"{'':20}{'marked: found':>15}{'z':>18}{'unmarked: found':>18}{'z':>18}"]
    for name in dict.fromkeys(row["distortion"] for row in rows):
        cells = f"{name:20}"
        for marked, width in (("1", 15), ("0", 18)):
            group = [row for row in rows if row["distortion"] == name and row["marked"] == marked]
            hits = sum(float(row["log10_rate"]) <= math.log10(RATE) for row in group)
            scores = [float(row["z"]) for row in group] or [math.nan]
            of_all = f"{hits} of {len(group)}"
            scores_range = f"{min(scores):.1f} to {max(scores):.1f}"
            cells += f"{of_all:>{width}}{scores_range:>18}"
        lines.append(cells)
    return "\n".join(lines)


def figure(rows: Sequence[dict[str, str]]) -> str:
    """The z of every clip as an SVG, by distortion: with the mark above, without it below."""
    groups: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        with_mark, without = groups.setdefault(row["distortion"], ([], []))
        scores = with_mark if row["marked"] == "1" else without
        scores.append(float(row["z"]))
    names = {name.replace("_", " "): scores for name, scores in groups.items()}
    title = "The start noise found again, with the mark (blue) and without it (gray)"
    limit = -NormalDist().inv_cdf(RATE)
    return strip(
        names, title=title, x_title="z, one tick a clip", limit=(limit, "false-positive rate of 1e-6 in one try")
    )


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m benchmarks.marks", description="Measure how well the start noise is found again.")
    p.add_argument("--csv", type=Path, default=RESULTS, help="one row a clip, mark and distortion (%(default)s)")
    p.add_argument("--show", action="store_true", help="measure nothing, print the summary, and draw it beside the CSV")
    p.add_argument("--model", type=Path, default=CHECKPOINT, help="folder with a motion.json (the tiny model)")
    p.add_argument("--seed", type=int, default=0, help="any integer: which clips (%(default)s)")
    p.add_argument("--clips", type=int, default=8, help="how many, of the four kinds in turn (%(default)s)")
    p.add_argument("--only", nargs="+", metavar="NAME", help="some distortions (all, and second_generation)")
    p.add_argument("--only-unmarked", nargs="+", metavar="NAME", help="those of unmarked clips (as of the marked ones)")
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of MotionConfig")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=list(DTYPES), help="bfloat16 where native, else float32")
    return p


def program(argv: list[str] | None = None) -> None:
    """Measure what is missing, and print the summary."""
    args = parser().parse_args(argv)
    if args.show:
        rows = read_rows(args.csv)
        if not rows or set(rows[0]) != set(COLUMNS):
            raise UserError(f"{args.csv} has no rows of this table: measure some, or give another --csv")
        write_bytes(args.csv.with_suffix(".svg"), figure(rows).encode())
        print(summary(rows))
        return
    check_range("clips", args.clips, 1)
    known = [*distortions(), "second_generation"]
    marked = args.only or known
    names = {True: marked, False: args.only_unmarked or marked}
    for given in names.values():
        if not set(given) <= set(known):
            raise UserError(f"--only needs some of {', '.join(known)}, got {', '.join(given)}")
    _, config = load_preset(args.model, fastvmt.MotionConfig())
    config = with_options(config, parse_pairs(args.set), "--set")
    device = pick_device(args.device)
    wan = load_wan(args.model, device=device, dtype=pick_dtype(device, args.dtype))
    clips = clip_seeds(args.seed, args.clips)
    measure_all(Transfers(wan, config, device), clips, names, args.csv, run_of(wan, config))
    print(f"{wan.name} on {device}, torch {torch.__version__}; found: false-positive rate of at most {RATE:g}")
    print(summary(read_rows(args.csv)))


if __name__ == "__main__":
    raise SystemExit(run(program))
