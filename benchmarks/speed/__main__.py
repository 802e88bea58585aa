"""Time and memory of every part: all tables of a device, one program after the other, and their JSON lines in a file.

    python -m benchmarks.speed --device cuda       # all rows of a GPU
    python -m benchmarks.speed --device cpu        # all rows of a CPU

Random weights are made in place and nothing is downloaded: a clone and PyTorch, with the packages of requirements.txt,
are enough. Rows that need diffusers are dashes where it is not installed.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.speed.bench import ROOT
from wan_mini.device.select import pick_device
from wan_mini.runs.cli import Parser

GPU_TABLES = (
    "gradient --size 1.3B --repeats 3",
    "amf --size 1.3B --repeats 3 --frames 9 21 41 81 161 --limit 2",
    "dit --size 1.3B",
    "vae --size 1.3B --repeats 1",
    "full_run --size 1.3B",
    "scaling --size small",
    "startup --repeats 1",
)
CPU_TABLES = (
    "gradient --size tiny",
    "gradient --size small --repeats 3",
    "amf --size 1.3B --repeats 1",
    "amf --size tiny --frames 9 21 41 81 161",
    "dit --size tiny",
    "dit --size small",
    "vae --size tiny",
    "vae --size small --repeats 3",
    "full_run --size tiny",
    "scaling --size tiny",
    "startup",
)


def run_table(table: str, device: torch.device, json_lines: TextIO) -> bool:
    """Run the program of one table, print what it prints, and keep its last line, the JSON; whether it succeeded."""
    name, *flags = table.split()
    command = [sys.executable, "-m", f"benchmarks.speed.{name}", *flags, "--device", str(device)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = process.stdout.splitlines()
    print("\n".join(lines[:-1]))
    if process.returncode != 0:
        return False
    print(lines[-1], file=json_lines, flush=True)
    return True


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 if a program failed; 2 if there is no such device."""
    parser = Parser(prog="python -m benchmarks.speed", description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    parser.add_argument("--out", type=Path, help="file of JSON lines (outputs/speed-DEVICE.jsonl)")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    tables = CPU_TABLES if device.type == "cpu" else GPU_TABLES
    out = args.out or ROOT / "outputs" / f"speed-{device.type}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    failed = []
    with out.open("w") as json_lines:
        for table in tables:
            if not run_table(table, device, json_lines):
                failed.append(table)
            print(f"[{table}: {time.perf_counter() - start:.0f} s since the start]", flush=True)
    if failed:
        print(f"wrote {out}, without {', '.join(failed)}, which failed")
        return 1
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
