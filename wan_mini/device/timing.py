"""Seconds and peak memory of each named stage of a run."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimer:
    """Seconds (summed) and peak memory of each named stage of a run, for its report."""

    def __init__(self, device: torch.device):
        self.device, self.table = device, {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the block; device work is finished before the clock stops."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds, peak = time.perf_counter() - start, self.peak_gb()
        before = self.table.get(name, {"seconds": 0.0, "peak_gb": peak})
        peak = None if peak is None else max(peak, before["peak_gb"])
        self.table[name] = {"seconds": round(before["seconds"] + seconds, 3), "peak_gb": peak}

    def peak_gb(self) -> float | None:
        """Most device memory (10^9 bytes) since the stage began; on a CPU the process's most so far, where known."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)
        try:
            import resource  # not on Windows
        except ImportError:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
