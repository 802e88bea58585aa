"""All tables of a device, one script after the other, and their JSON lines in a file.

    python -m benchmarks --device cuda       # all rows of a GPU
    python -m benchmarks --device cpu        # all rows of a CPU

Random weights are made in place and nothing is downloaded: a clone and PyTorch, with the packages of requirements.txt,
are enough. Rows that need diffusers are dashes where it is not installed.
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import ROOT
from wan_mini.device.select import pick_device
from wan_mini.runs.cli import Parser

ON_A_GPU = (
    "gradient --size 1.3B --repeats 3",
    "amf --size 1.3B --repeats 3 --frames 9 21 41 81 161 --limit 2",
    "dit --size 1.3B",
    "vae --size 1.3B --repeats 1",
    "whole --size 1.3B",
    "growth --size small",
    "start --repeats 1",
)
ON_A_CPU = (
    "gradient --size tiny",
    "gradient --size small --repeats 3",
    "amf --size 1.3B --repeats 1",
    "amf --size tiny --frames 9 21 41 81 161",
    "dit --size tiny",
    "dit --size small",
    "vae --size tiny",
    "vae --size small --repeats 3",
    "whole --size tiny",
    "growth --size tiny",
    "start",
)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 1 if a script failed."""
    p = Parser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--out", type=Path, help="file of JSON lines (outputs/benchmarks-DEVICE.jsonl)")
    args = p.parse_args(argv)
    device, start, failed = pick_device(args.device), time.perf_counter(), []
    out = args.out or ROOT / "outputs" / f"benchmarks-{device.type}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as lines:
        for table in ON_A_CPU if device.type == "cpu" else ON_A_GPU:
            name, *flags = table.split()
            command = [sys.executable, "-m", f"benchmarks.{name}", *flags, "--device", str(device)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            *text, last = done.stdout.splitlines() or [""]
            print(*text, f"[{table}: {time.perf_counter() - start:.0f} s since the start]", sep="\n", flush=True)
            if done.returncode:
                failed.append(table)
            else:
                print(last, file=lines, flush=True)
    print(f"wrote {out}" + (f", without {', '.join(failed)}, which failed" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
