"""python -m wan_mini.tiny.training STAGE: train the tiny Wan from a seed to a checkpoint, in two stages.

    vae                     the VAE, on crops of fresh clips
    dit                     DiT, by flow matching on the latents of fresh pictures and clips
    all                     one after the other
    dit-without-matching    in the place of dit: without its auxiliary loss, for comparison, and in a --folder of its
                            own, into which the VAE was copied

The same command again goes on where the last one stopped.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from wan_mini.device.select import DTYPES, pick_device, pick_dtype
from wan_mini.errors import check_positive, check_range
from wan_mini.runs.cli import Parser, run
from wan_mini.tiny.training.dit import train_dit
from wan_mini.tiny.training.recipe import DIT, without_matching
from wan_mini.tiny.training.record import claim
from wan_mini.tiny.training.trainer import Job
from wan_mini.tiny.training.vae import train_vae

UNMATCHED = "dit-without-matching"
TRAIN: dict[str, Callable[[Job], None]] = {
    "vae": train_vae,
    "dit": train_dit,
    UNMATCHED: partial(train_dit, recipe=without_matching(DIT), name=UNMATCHED),
}
ALL = ("vae", "dit")


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m wan_mini.tiny.training", description="Train the tiny Wan.")
    p.add_argument("stage", choices=[*TRAIN, "all"])
    p.add_argument("--seed", type=int, default=0, help="%(default)s")
    p.add_argument("--folder", type=Path, default=Path("outputs/tiny/checkpoint"), help="the result (%(default)s)")
    p.add_argument("--work", type=Path, default=Path("outputs/tiny"), help="data, states, pictures (%(default)s)")
    p.add_argument("--minutes", type=float, default=math.inf, help="pause after so many")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=list(DTYPES), help="of products (bfloat16 where that is fast, else float32)")
    p.add_argument("--workers", type=int, default=1, help="processes that make data ahead (%(default)s)")
    p.add_argument("--traceback", action="store_true", help="show where an error came from")
    return p


def program(argv: list[str] | None) -> None:
    """Parse, then train."""
    args = parser().parse_args(argv)
    check_range("--seed", args.seed)
    check_range("--workers", args.workers)
    if args.minutes != math.inf:
        check_positive("--minutes", args.minutes)
    device = pick_device(args.device)
    dtype = pick_dtype(device, args.dtype)
    args.work.mkdir(parents=True, exist_ok=True)
    job = Job(args.work, args.folder, device, dtype, args.seed, args.workers, time.monotonic() + 60 * args.minutes)
    stages = ALL if args.stage == "all" else (args.stage,)
    for stage in stages:
        if stage != "vae":  # before hours of training, not after them
            claim(job.folder, stage)
    for stage in stages:
        TRAIN[stage](job)


if __name__ == "__main__":
    raise SystemExit(run(program))
