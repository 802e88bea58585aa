"""What all tables share: how a call is measured, what the machine can do at best, how rows are printed.

A row is one call, warmed up by a first one and repeated: the median of the seconds, with the device's work finished
before the clock stops. Its ratio is to another row of the same process. On a CPU short calls take turns, and the
ratio is the median of each turn's: a machine that is shared drifts by more than some rows differ. (On a GPU one call
would find the allocator's cache as the other left it.) Its peak is the most memory that its tensors hold at once beyond
what was held before it; a GPU says it itself, on a CPU it is read off the profiler's list of allocations (in the
warm-up, so that it costs no time). Its percentages are of what this machine did in this process: one large matrix
product of the row's dtype, one large copy. What could not be measured is a dash with its reason.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastvmt
from benchmarks.models import SIZES
from wan_mini.device.memory import free_memory
from wan_mini.device.select import DTYPES, pick_device, pick_dtype
from wan_mini.runs.cli import Parser

ROOT = Path(fastvmt.__file__).parent
SHORT = 5.0  # seconds of a call that others take turns with: a longer one outlasts most of the drift
ENOUGH = 30.0  # seconds of timed calls, the reference's included, after which a row makes do with its repeats
COLUMNS = {  # what a row holds: its heading, and how it is printed
    "seconds": ("seconds", "{:.4g}"),
    "spread": ("+-", "{:.0%}"),
    "peak_gb": ("peak GB", "{:.3g}"),
    "time_ratio": ("time x", "{:.4g}"),
    "memory_ratio": ("memory x", "{:.3g}"),
    "matmul_share": ("of matmul", "{:.1%}"),
    "copy_share": ("of copy", "{:.1%}"),
}


def parser(doc: str, *, sizes: bool = True, repeats: int = 5) -> Parser:
    """The flags that all scripts have."""
    p = Parser(description=doc.splitlines()[0])
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=list(DTYPES), help="of the weights (bfloat16 where native)")
    p.add_argument("--repeats", type=int, default=repeats, help="timed calls of a row (%(default)s)")
    if sizes:
        p.add_argument("--size", choices=list(SIZES), default="tiny", help="of model and clip (%(default)s)")
    return p


class Bench:
    """One table: rows measured on one device in one process."""

    def __init__(self, name: str, args: Namespace):
        self.name, self.args, self.repeats = name, args, args.repeats
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(self.device, args.dtype)
        self.size = SIZES[args.size] if "size" in args else None
        self.rows: dict[str, dict[str, Any]] = {}
        self.calls: dict[str, tuple[Callable[[], Any], int]] = {}
        self.facts: dict[str, Any] = {}
        self.ceilings: dict[str, float] = {}
        if self.device.index is not None:
            torch.get_device_module(self.device).set_device(self.device)
        torch.manual_seed(0)

    def row(self, name: str, call: Callable[[], Any], *, times: int = 1, to: str | None = None, **options: Any) -> None:
        """Measure a call that does `times` of what the row names, in turns with the row `to`; options as record's."""
        beside, beside_times = self.calls.get(to, (None, 1))
        cost = None
        with suppress(torch.OutOfMemoryError):
            cost = measure(call, self.device, self.repeats, beside)
        if cost is None:
            gc.collect()
            if hasattr(backend := torch.get_device_module(self.device), "empty_cache"):
                backend.empty_cache()
            self.skip(name, "out of memory")
            return
        if self.device.type == "cpu" and cost["seconds"] <= SHORT:
            self.calls[name] = call, times
        ratio = cost.pop("ratio")
        ratio = None if ratio is None else ratio * beside_times / times
        self.record(name, to=to, **cost | {"seconds": cost["seconds"] / times}, time_ratio=ratio, **options)

    def record(
        self,
        name: str,
        *,
        to: str | None = None,
        operations: float = 0,
        moved: float = 0,
        dtype: torch.dtype | None = None,
        time_ratio: float | None = None,
        **cost: Any,
    ) -> None:
        """Note what a row cost, beside the row `to`; operations of products in dtype, and bytes moved, if it has any.

        Operations are those that the result needs: computing something twice makes a row slower, not better.
        """
        other = self.rows.get(to, {})
        cost["to"] = to if other.get("seconds") else None
        cost["time_ratio"] = (time_ratio or cost["seconds"] / other["seconds"]) if cost["to"] else None
        both = cost["to"] and cost.get("peak_gb") and other.get("peak_gb")
        cost["memory_ratio"] = cost["peak_gb"] / other["peak_gb"] if both else None
        if operations:
            cost["tflops"] = operations / cost["seconds"] / 1e12
            cost["matmul_share"] = cost["tflops"] / self.matmul_ceiling(dtype or self.dtype)
        if moved:
            cost["gb_per_second"] = moved / cost["seconds"] / 1e9
            cost["copy_share"] = cost["gb_per_second"] / self.copy_ceiling()
        self.rows[name] = cost

    def skip(self, name: str, reason: str) -> None:
        """A row of dashes, with the beginning of the reason."""
        self.rows[name] = {"seconds": None, "note": " ".join(reason.split())[:100]}

    def matmul_ceiling(self, dtype: torch.dtype) -> float:
        """TFLOP/s of one large product of square matrices, laid out as in a linear layer, measured once."""
        name, side = f"matmul_{dtype}_tflops".replace("torch.", ""), 2048 if self.device.type == "cpu" else 8192
        if name not in self.ceilings:
            a, b = torch.randn(2, side, side, device=self.device, dtype=dtype)
            self.ceilings[name] = 2 * side**3 / measure(lambda: a @ b.mT, self.device, self.repeats)["seconds"] / 1e12
        return self.ceilings[name]

    def copy_ceiling(self) -> float:
        """GB/s, read and written, of a copy of 512 MB, measured once."""
        if "copy_gb_per_second" not in self.ceilings:
            a, b = torch.ones(2, 2**29, device=self.device, dtype=torch.uint8)
            seconds = measure(lambda: b.copy_(a), self.device, self.repeats)["seconds"]
            self.ceilings["copy_gb_per_second"] = 2**30 / seconds / 1e9
        return self.ceilings["copy_gb_per_second"]

    def finish(self) -> None:
        """Print the table, and below it the same and all facts as one line of JSON."""
        size = f" {self.args.size}" if "size" in self.args else ""
        about = machine(self.device) | {"dtype": str(self.dtype).removeprefix("torch.")}
        print(f"\n{self.name}{size}: " + ", ".join(f"{key} {value}" for key, value in about.items()))
        print(table(self.rows))
        for key, value in (self.ceilings | self.facts).items():
            print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
        settings = {key: value for key, value in vars(self.args).items() if value is not None}
        line = {"benchmark": self.name, "settings": settings, "machine": about, "ceilings": self.ceilings}
        print(json.dumps({**line, "facts": self.facts, "rows": self.rows}), flush=True)


def measure(
    call: Callable[[], Any], device: torch.device, repeats: int, beside: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """Seconds, their spread (half the range, as a share) and peak memory of a call, after a first one.

    beside: another call, already warm, to take turns with; "ratio" is the median of call / beside over the turns.
    """
    backend = torch.get_device_module(device)
    counts, peak = hasattr(backend, "max_memory_allocated"), None
    if device.type == "cpu":
        peak = logged_peak(call)
    else:
        call()
    seconds: list[float] = []
    beside_seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) + sum(beside_seconds) < ENOUGH:
        if beside is not None:
            beside_seconds.append(stopwatch(beside, backend))
        if counts:
            before = backend.memory_allocated()
            backend.reset_peak_memory_stats()
        seconds.append(stopwatch(call, backend))
        if counts:
            peak = max(peak or 0, backend.max_memory_allocated() - before)
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "spread": (max(seconds) - min(seconds)) / 2 / median if len(seconds) > 1 else None,
        "repeats": len(seconds),
        "peak_gb": None if peak is None else peak / 1e9,
        "ratio": statistics.median(a / b for a, b in zip(seconds, beside_seconds)) if beside else None,
    }


def stopwatch(call: Callable[[], Any], backend: Any) -> float:
    """Seconds of a call, with the device's work finished before and after."""
    backend.synchronize()
    start = time.perf_counter()
    call()
    backend.synchronize()
    return time.perf_counter() - start


def logged_peak(call: Callable[[], Any]) -> int:
    """Most bytes that a call's tensors held at once on a CPU, by the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports its own stages between the tables
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes, initial=0))


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Exponent of a growth: slope of a straight line through the logarithms of (n, cost)."""
    return np.polyfit(*np.log(points).T, 1)[0].item()


def available_bytes(device: torch.device) -> int:
    """Memory that new tensors may take; a CPU has no error to catch when it runs out."""
    free = free_memory(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if free is None else free


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of a - b over the norm of b."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure is worthless without."""
    backend, name = torch.get_device_module(device), platform.machine()
    if hasattr(backend, "get_device_name"):
        name = backend.get_device_name()
    elif (cpuinfo := Path("/proc/cpuinfo")).exists():
        name = next((line.split(": ")[1] for line in cpuinfo.read_text().splitlines() if "model name" in line), name)
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    facts = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return facts | {"commit": found.stdout.strip() or "unknown", "date": date.today().isoformat()}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """All rows under one heading; a dash is what was not measured."""
    lines = [["", *(heading for heading, _ in COLUMNS.values()), "to", ""]]
    for name, row in rows.items():
        cells = [form.format(row[key]) if row.get(key) is not None else "-" for key, (_, form) in COLUMNS.items()]
        lines.append([name, *cells, row.get("to") or "-", row.get("note", "")])
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = []
    for first, *numbers, to, note in lines:
        middle = (cell.rjust(width) for cell, width in zip(numbers, widths[1:]))
        texts.append("  ".join([first.ljust(widths[0]), *middle, to.ljust(widths[-2]), note]).rstrip())
    return "\n".join(texts)
