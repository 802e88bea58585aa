"""How long one waits: PyTorch's import, `python fastvmt.py --help`, and the default run of the tiny model.

Each in a process of its own, from its start to its end, as a user meets it; peaks are of the whole process.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.speed.bench import ROOT, Bench, build_parser
from benchmarks.speed.measure import median_and_spread
from wan_mini.runs.cli import run


class ProgramError(Exception):
    """A program's exit status was not 0; the message is the last line that it printed."""


def run_program(command: list[str], log: Path) -> tuple[float, float]:
    """Seconds and peak GB of a process. Raises ProgramError."""
    start = time.perf_counter()
    with log.open("w+b") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise ProgramError(lines[-1])
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit / 1e9


def time_program(bench: Bench, name: str, command: list[str], folder: Path) -> None:
    """A row for one program; "OUT" in its command becomes a new folder each time."""
    seconds = []
    peaks = []
    for repeat in range(bench.repeats + 1):
        out = str(folder / f"run{repeat}")
        arguments = [out if argument == "OUT" else argument for argument in command]
        try:
            duration, peak = run_program(arguments, folder / "log")
        except ProgramError as error:
            bench.skip(name, f"failed: {error}")
            return
        if repeat > 0:  # the first fills the disk's cache
            seconds.append(duration)
            peaks.append(peak)
    median, spread = median_and_spread(seconds)
    peak = max(peaks)
    bench.record(name, median, peak_gb=peak, reference="import torch", spread=spread, repeats=len(seconds))


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    bench = Bench("startup", build_parser(__doc__, sizes=False, repeats=3).parse_args(argv))
    programs = {
        "import torch": ["-c", "import torch"],
        "fastvmt.py --help": ["fastvmt.py", "--help"],
        "fastvmt.py, tiny default run": ["fastvmt.py", "--device", str(bench.device), "--out", "OUT"],
    }
    with TemporaryDirectory() as folder:
        for name, command in programs.items():
            time_program(bench, name, command, Path(folder))
    bench.finish()


if __name__ == "__main__":
    raise SystemExit(run(main))
