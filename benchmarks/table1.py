"""FastVMT beside its peers on one backbone: the paper's Table 1, against true motion of held-out clips.

    python -m benchmarks.table1 --clips 50                      # all methods; hours, and a stopped run goes on
    python -m benchmarks.table1 --clips 8 --methods fastvmt "moft, equal"
    python -m benchmarks.table1 --show                          # the table of what has been run
    torchrun --nproc-per-node 8 -m benchmarks.table1 --clips 50       # each process takes the next clip

A training-free peer has two rows. "own" is its authors' guided share and updates, with rates scaled to FastVMT's sum
of rate x updates; "equal" is FastVMT's share, updates and rates, with a gradient at every update. Methods that train
have the options of wan_mini/peers/presets.py. Chance rows say what each measure gives to videos that follow nothing.
A row of the CSV is one clip and method, all from the same noise.
"""

import hashlib
import json
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastvmt
from benchmarks.evaluate import clip_seeds
from benchmarks.metrics.fidelity import chance_levels, unrelated_clip
from benchmarks.metrics.flags import add_clip_flags
from benchmarks.metrics.rows import Row, append_rows, check_settings, ranks, read_rows, start_rows, table
from benchmarks.metrics.world import quality
from wan_mini.config import latent_shape
from wan_mini.device.memory import GB, Gradient, gradient_bytes, module_bytes
from wan_mini.device.select import device_of_process, pick_dtype
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.load import Wan, load_wan
from wan_mini.peers import adapted, presets, training_free
from wan_mini.peers.methods import METHODS, gradient_of
from wan_mini.pipeline import Transfer
from wan_mini.runs.cli import Parser, run
from wan_mini.runs.jobs import JobQueue
from wan_mini.runs.request import load_preset
from wan_mini.tiny.world import SPLITS, Clip, make_clip, other_scene, score

Run = Callable[[Wan, Clip, str, int], Transfer]  # model, reference, prompt, seed
RESULTS = Path(__file__).parent / "results" / "table1.csv"
# Rows of training-free peers: the peer, its budget, and what differs from training_free.preset_of. A narrow model has
# too few channels for MOFT's 4 %; MotionClone's own update is the score update. None was chosen on held-out clips.
PEER_ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ditflow, equal": ("ditflow", "equal", {"inject": ()}),
    "ditflow, own": ("ditflow", "own", {}),
    "smm, equal": ("smm", "equal", {}),
    "smm, own": ("smm", "own", {}),
    "smm as in ditflow's code": ("smm", "equal", {"variant": "ditflow"}),
    "moft, equal": ("moft", "equal", {"channels": 0.25}),
    "moft, own": ("moft", "own", {"channels": 0.25}),
    "motionclone, equal": ("motionclone", "equal", {"reference": "noised"}),
    "motionclone, own": ("motionclone", "own", {"update": "score"}),
    "flowmotion, equal": ("flowmotion", "equal", {"velocity": "step"}),
    "flowmotion, own": ("flowmotion", "own", {}),
}
# Rows of methods that train adapters, and Follow-Your-Motion's controls: what differs from presets.load_preset.
TRAINED_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "follow-your-motion": ("fym", {}),
    "follow-your-motion, all heads": ("fym", {"heads": "all"}),
    "follow-your-motion, random heads": ("fym", {"heads": "random"}),
    "follow-your-motion, swapped heads": ("fym", {"heads": "swapped"}),
    "follow-your-motion, no adaptive RoPE": ("fym", {"rope": "none"}),
    "follow-your-motion, dense sampling": ("fym", {"sparse": "none"}),
    "follow-your-motion, no motion loss": ("fym", {"motion": "none"}),
    "motiondirector": ("motiondirector", {}),
    "motioninversion": ("motioninversion", {}),
    "det": ("det", {}),
}


@dataclass(frozen=True)
class Entry:
    """A method of the table."""

    config: Any  # its options, a dataclass
    run: Run
    gradient: Gradient | None  # one gradient or training step, for its memory; None: nothing beyond a forward pass


def entries(folder: Path) -> dict[str, Entry]:
    """Every method of the table by its name, with its options for the checkpoint in this folder."""
    _, preset = load_preset(folder, fastvmt.MotionConfig())
    methods = {}
    for name, amf in (("none", "none"), ("dense flow", "dense"), ("fastvmt", preset.amf)):
        config = replace(preset, amf=amf)
        methods[name] = Entry(config, partial(_guided, fastvmt.transfer, config), fastvmt.gradient_of(config))
    for name, (peer, budget, changes) in PEER_ROWS.items():
        _, own = training_free.preset_of(folder, peer, budget)
        options: Any = replace(own, **changes)
        methods[name] = Entry(
            options, partial(_guided, training_free.transfer, options), training_free.gradient_of(options)
        )
    for name, (method, changes) in TRAINED_ROWS.items():
        _, options = presets.load_preset(folder, METHODS[method].config, method)
        options = replace(options, **changes)
        methods[name] = Entry(options, partial(_trained, options), gradient_of(options))
    return methods


def _guided(transfer: Callable[..., Transfer], config: Any, wan: Wan, clip: Clip, prompt: str, seed: int) -> Transfer:
    """A training-free method's run."""
    return transfer(wan, clip.frames, prompt, config, seed=seed)


def _trained(config: Any, wan: Wan, clip: Clip, prompt: str, seed: int) -> Transfer:
    """A run that trains adapters with the reference's own caption."""
    return adapted.transfer(wan, clip.frames, prompt, config, ref_prompt=clip.caption, seed=seed)


def settings_of(config: Any, hashes: Mapping[str, str]) -> str:
    """Eight letters that differ if options or weights do: rows of different settings must not be averaged."""
    text = json.dumps([type(config).__name__, asdict(config), dict(hashes)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def counted_peak(dit: WanDiT, frames: np.ndarray, entry: Entry) -> float:
    """GB of weights and of the larger of one gradient and one forward pass, counted on meta tensors: see memory.py."""
    shape = latent_shape(*frames.shape[:3])
    dtype = dit.patch_embedding.weight.dtype
    needed = gradient_bytes(dit.config, dtype, shape, _forward, "none", False)
    if entry.gradient is not None:
        needed = max(needed, gradient_bytes(dit.config, dtype, shape, entry.gradient, "none", False))
    return (module_bytes(dit) + needed) / GB


@torch.no_grad()
def _forward(dit: WanDiT, latents: Tensor, text: Tensor, recompute: str) -> None:
    """A pass of the model without a gradient, in the form of memory.Gradient."""
    dit(latents, torch.tensor([500.0]), text)


def chance_rows(clip: Clip, seed: int) -> Iterator[tuple[str, Row]]:
    """What the measures give to videos that nobody guided, by the row's name: what is above them says something."""
    scene = other_scene(clip, seed)
    videos = {
        "the reference itself": clip.frames,
        "chance: another clip": unrelated_clip(clip, seed).frames,
        "chance: the reference's first frame": np.repeat(clip.frames[:1], len(clip.frames), axis=0),
    }
    for name, frames in videos.items():
        yield name, {**score(frames, clip, scene), **quality(frames, clip, scene)}
    yield from chance_levels(clip, seed)


def method_row(entry: Entry, wan: Wan, clip: Clip, seed: int) -> Row:
    """Run a method and measure its video."""
    scene = other_scene(clip, seed)
    start = time.perf_counter()
    result = entry.run(wan, clip, scene.caption, seed)
    seconds = time.perf_counter() - start
    assert result.frames is not None  # a run ends with its frames
    row: Row = {**score(result.frames, clip, scene), **quality(result.frames, clip, scene)}
    peak = counted_peak(wan.dit, clip.frames, entry)
    return {**row, "gradients": result.report["gradients"], "seconds": seconds, "peak_gb": peak}


def rows_of(
    wan: Wan, methods: Mapping[str, Entry], clips: Sequence[tuple[int, str]], split: str, done: set[tuple[str, str]]
) -> Iterator[Row]:
    """One row for each clip and method that is not in `done` ({(clip, method)}), clip by clip."""
    for number, kind in clips:
        clip = make_clip(number, kind, split)
        head = {"clip": str(number), "kind": kind}
        for name, measures in chance_rows(clip, number):
            if (str(number), name) not in done:
                yield {**head, "method": name, "settings": "", **measures}
        for name, entry in methods.items():
            if (str(number), name) not in done:
                settings = settings_of(entry.config, wan.hashes)
                yield {**head, "method": name, "settings": settings, **method_row(entry, wan, clip, number)}


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m benchmarks.table1", description="FastVMT beside its peers, against true motion.")
    add_clip_flags(p, RESULTS, clips=50)
    p.add_argument("--split", choices=SPLITS, default="held-out", help="of the world's clips (%(default)s)")
    p.add_argument("--methods", nargs="+", metavar="NAME", help='some of the table\'s, such as fastvmt "moft, equal"')
    return p


def run_missing(args: Namespace, known: Mapping[str, Entry], names: Sequence[str], queue: JobQueue) -> int:
    """Append the rows that the CSV lacks and list all options. Returns 1 if a clip failed in any process, else 0."""
    rows = read_rows(args.csv)
    device = device_of_process(args.device)
    wan = load_wan(args.model, device=device, dtype=pick_dtype(device, args.dtype))
    methods = {name: known[name] for name in names}
    settings = {name: settings_of(entry.config, wan.hashes) for name, entry in methods.items()}
    check_settings(rows, settings, args.csv)
    done = {(row["clip"], row["method"]) for row in rows}
    clips = clip_seeds(args.seed, args.clips)
    options = {name: asdict(entry.config) for name, entry in known.items()}

    def prepare() -> None:
        start_rows(args.csv)
        args.csv.with_suffix(".json").write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")

    def measure(clip: tuple[int, str]) -> None:
        append_rows(rows_of(wan, methods, [clip], args.split, done), args.csv)

    queue.begin(prepare)
    queue.run(measure, clips, [f"clip {number}" for number, _ in clips], tracebacks=False)
    return queue.finish()[0]


def program(argv: list[str] | None = None) -> int:
    """Run what the CSV lacks, and print the table. Returns 1 if a clip failed, else 0."""
    args = parser().parse_args(argv)
    if args.clips < 1:
        raise UserError(f"got --clips {args.clips}: give at least 1")
    known = entries(args.model)
    names = args.methods or list(known)
    unknown = sorted(set(names) - known.keys())
    if unknown:
        raise UserError(f"got --methods {', '.join(unknown)}: choose from {'; '.join(known)}")
    failed = 0
    queue = JobQueue()
    if not args.show:
        failed = run_missing(args, known, names, queue)
    if queue.rank == 0:
        rows = read_rows(args.csv)
        print(table(rows, list(known)))
        print("\n".join(ranks(rows)))
    return failed


if __name__ == "__main__":
    raise SystemExit(run(program))
