"""One table of measurements: its flags, its rows, and how they are printed.

A row is one call (measure.py). Its ratios are to another row of the same process. Its percentages are of what this
machine did in this process: one large matrix product of the row's dtype, one large copy. What could not be measured is
a dash with its reason.
"""

import gc
import json
import platform
import subprocess
from argparse import Namespace
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.measure import Call, Cost, measure
from benchmarks.speed.random_models import SIZE_NAMES, named_size
from wan_mini.device.select import DTYPES, pick_attention, pick_device, pick_dtype
from wan_mini.runs.cli import Parser

ROOT = Path(__file__).parents[2]
SHORT = 5.0  # seconds of a call that alternates with its reference: a longer one outlasts most of the drift
COLUMNS = {  # what a row holds: its heading, and how it is printed
    "seconds": ("seconds", "{:.4g}"),
    "spread": ("+-", "{:.0%}"),
    "peak_gb": ("peak GB", "{:.3g}"),
    "time_ratio": ("time x", "{:.4g}"),
    "memory_ratio": ("memory x", "{:.3g}"),
    "matmul_share": ("of matmul", "{:.1%}"),
    "copy_share": ("of copy", "{:.1%}"),
}
Row = dict[str, Any]


def build_parser(doc: str | None, *, sizes: bool = True, repeats: int = 5) -> Parser:
    """The flags that all programs have; doc: the program's docstring."""
    parser = Parser(description=str(doc).splitlines()[0])
    parser.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights (bfloat16 where native)")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed calls of a row (%(default)s)")
    if sizes:
        parser.add_argument("--size", choices=SIZE_NAMES, default="tiny", help="of model and clip (%(default)s)")
    return parser


class Bench:
    """One table: rows measured on one device in one process."""

    def __init__(self, name: str, args: Namespace):
        self.name = name
        self.args = args
        self.repeats: int = args.repeats
        self.size = named_size(getattr(args, "size", "tiny"))
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(self.device, args.dtype)
        self.attention = pick_attention(self.device)  # kernels in the order in which a run asks for them
        self.rows: dict[str, Row] = {}
        self.calls: dict[str, tuple[Call, int]] = {}  # of the rows that can alternate with others
        self.results: dict[str, Any] = {}  # what follows from the rows
        self.ceilings: dict[str, float] = {}
        if self.device.index is not None:
            torch.get_device_module(self.device).set_device(self.device)
        torch.manual_seed(0)

    def row(self, name: str, call: Call, *, times: int = 1, reference: str | None = None, **options: Any) -> None:
        """Measure a call that does `times` of what the row names, beside the row `reference`; options as record's."""
        reference_call, reference_times = None, 1
        if reference in self.calls:
            reference_call, reference_times = self.calls[reference]
        cost: Cost | None = None
        with suppress(torch.OutOfMemoryError):
            cost = measure(call, self.device, self.repeats, reference_call)
        if cost is None:
            self.release_memory()
            self.skip(name, "out of memory")
            return
        if self.device.type == "cpu" and cost.seconds <= SHORT:
            self.calls[name] = call, times
        ratio = cost.ratio
        if ratio is not None:
            ratio = ratio * reference_times / times
        measured: dict[str, Any] = {"spread": cost.spread, "repeats": cost.repeats, "peak_gb": cost.peak_gb}
        self.record(name, cost.seconds / times, reference=reference, time_ratio=ratio, **measured, **options)

    def record(
        self,
        name: str,
        seconds: float,
        *,
        peak_gb: float | None = None,
        reference: str | None = None,
        operations: float = 0,
        moved: float = 0,
        dtype: torch.dtype | None = None,
        time_ratio: float | None = None,
        **columns: Any,
    ) -> None:
        """Note what a row cost, beside the row `reference`; operations of products in dtype, and bytes moved, if any.

        Operations are those that the result needs: computing something twice makes a row slower, not better.
        """
        row: Row = {"seconds": seconds, "peak_gb": peak_gb, **columns}
        row |= {"reference": None, "time_ratio": None, "memory_ratio": None}
        other = self.rows.get(reference or "", {})
        if other.get("seconds"):
            row["reference"] = reference
            row["time_ratio"] = time_ratio or seconds / other["seconds"]
            if peak_gb and other.get("peak_gb"):
                row["memory_ratio"] = peak_gb / other["peak_gb"]
        if operations:
            row["tflops"] = operations / seconds / 1e12
            row["matmul_share"] = row["tflops"] / self.matmul_ceiling(dtype or self.dtype)
        if moved:
            row["gb_per_second"] = moved / seconds / 1e9
            row["copy_share"] = row["gb_per_second"] / self.copy_ceiling()
        self.rows[name] = row

    def skip(self, name: str, reason: str) -> None:
        """A row of dashes, with the beginning of the reason."""
        self.rows[name] = {"seconds": None, "note": " ".join(reason.split())[:100]}

    def release_memory(self) -> None:
        """Give back what a call that ran out of memory left behind."""
        gc.collect()
        backend = torch.get_device_module(self.device)
        if hasattr(backend, "empty_cache"):
            backend.empty_cache()

    def matmul_ceiling(self, dtype: torch.dtype) -> float:
        """TFLOP/s of one large product of square matrices, laid out as in a linear layer, measured once."""
        name = f"matmul_{dtype}_tflops".replace("torch.", "")
        if name not in self.ceilings:
            side = 2048 if self.device.type == "cpu" else 8192
            a, b = torch.randn(2, side, side, device=self.device, dtype=dtype)
            cost = measure(lambda: a @ b.mT, self.device, self.repeats)
            self.ceilings[name] = 2 * side**3 / cost.seconds / 1e12
        return self.ceilings[name]

    def copy_ceiling(self) -> float:
        """GB/s, read and written, of a copy of 512 MB, measured once."""
        if "copy_gb_per_second" not in self.ceilings:
            a, b = torch.ones(2, 2**29, device=self.device, dtype=torch.uint8)
            cost = measure(lambda: b.copy_(a), self.device, self.repeats)
            self.ceilings["copy_gb_per_second"] = 2**30 / cost.seconds / 1e9
        return self.ceilings["copy_gb_per_second"]

    def finish(self) -> None:
        """Print the table, and below it the same and all results as one line of JSON."""
        settings = {key: value for key, value in vars(self.args).items() if value is not None}
        size = f" {settings['size']}" if "size" in settings else ""
        machine = describe_machine(self.device)
        machine["dtype"] = str(self.dtype).removeprefix("torch.")
        print(f"\n{self.name}{size}: " + ", ".join(f"{key} {value}" for key, value in machine.items()))
        print(format_table(self.rows))
        for key, value in (self.ceilings | self.results).items():
            print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
        line = {"benchmark": self.name, "settings": settings, "machine": machine, "ceilings": self.ceilings}
        line |= {"results": self.results, "rows": self.rows}
        print(json.dumps(line), flush=True)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a figure is worthless without: device, threads, torch, commit, date."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": process.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """The product's name, such as "NVIDIA H100 80GB HBM3" or "AMD EPYC", where the system knows it."""
    backend = torch.get_device_module(device)
    if hasattr(backend, "get_device_name"):
        return backend.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if "model name" in line:
                return line.split(": ")[1]
    return platform.machine()


def format_table(rows: dict[str, Row]) -> str:
    """All rows under one heading; a dash is what was not measured."""
    headings = [heading for heading, _ in COLUMNS.values()]
    lines = [["", *headings, "to", ""]]
    for name, row in rows.items():
        cells = [name]
        for key, (_, form) in COLUMNS.items():
            cells.append("-" if row.get(key) is None else form.format(row[key]))
        cells.append(row.get("reference") or "-")
        cells.append(row.get("note", ""))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for name, *numbers, reference, note in lines:
        padded = [name.ljust(widths[0])]
        for cell, width in zip(numbers, widths[1:-2], strict=True):
            padded.append(cell.rjust(width))
        padded += [reference.ljust(widths[-2]), note]
        texts.append("  ".join(padded).rstrip())
    return "\n".join(texts)
