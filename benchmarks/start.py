"""How long one waits: PyTorch's import, `python fastvmt.py --help`, and the default run of the tiny model.

Each in a process of its own, from its start to its end, as a user meets it; peaks are of the whole process.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import ROOT, Bench, parser


def run_program(command: list[str], log: Path) -> tuple[float, float, str | None]:
    """Seconds, peak GB, and the last line that it said if it failed."""
    start = time.perf_counter()
    with log.open("w+b") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    return seconds, usage.ru_maxrss * unit / 1e9, lines[-1] if status else None


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    bench = Bench("start", parser(__doc__, sizes=False, repeats=3).parse_args(argv))
    with TemporaryDirectory() as folder:
        programs = {
            "import torch": ["-c", "import torch"],
            "fastvmt.py --help": ["fastvmt.py", "--help"],
            "fastvmt.py, tiny default run": ["fastvmt.py", "--device", str(bench.device), "--out", f"{folder}/run"],
        }
        for name, command in programs.items():
            costs = []
            for repeat in range(bench.repeats + 1):  # the first fills the disk's cache
                again = [f"{part}{repeat}" if part.startswith(folder) else part for part in command]
                costs.append(run_program(again, Path(folder, "log")))
                if costs[-1][2]:
                    break
            if costs[-1][2]:
                bench.skip(name, f"failed: {costs[-1][2]}")
                continue
            seconds, peaks, _ = zip(*costs[1:])
            middle = statistics.median(seconds)
            spread = (max(seconds) - min(seconds)) / 2 / middle
            bench.record(
                name, seconds=middle, spread=spread, peak_gb=max(peaks), to="import torch", repeats=len(seconds)
            )
    bench.finish()


if __name__ == "__main__":
    main()
