"""The flags that programs share which measure clips of the world and append a row for each to a CSV."""

from pathlib import Path

from wan_mini.device.select import DTYPES
from wan_mini.runs.cli import Parser
from wan_mini.tiny.demo import CHECKPOINT


def add_clip_flags(p: Parser, results: Path, *, clips: int, seed: int = 0) -> None:
    """Add them; results: the CSV, clips and seed: the defaults."""
    p.add_argument("--model", type=Path, default=CHECKPOINT, help="folder with a motion.json (the tiny model)")
    p.add_argument("--seed", type=int, default=seed, help="any integer: which of the world's clips (%(default)s)")
    p.add_argument("--clips", type=int, default=clips, help="how many, of the four kinds in turn (%(default)s)")
    p.add_argument("--csv", type=Path, default=results, help="one row a clip and setting (%(default)s)")
    p.add_argument("--show", action="store_true", help="run nothing, show what the CSV has")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=list(DTYPES), help="bfloat16 where native, else float32")
