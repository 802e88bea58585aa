"""Seconds and peak memory of each named stage of a run."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished the work queued on it; a CPU never queues any."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class StageTimer:
    """Seconds and peak memory of each named stage of a run.

        timer = StageTimer(device)
        with timer("encode"):
            ...
        timer.table["encode"]  # {"seconds": 1.234, "peak_gb": 5.678}

    The seconds of a name that is used again add up, and its largest peak stays. A stage inside another one is taken out
    of it, so that no second counts twice and total() is the time spent in stages.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int | None] = {}
        self._open: list[str] = []  # the stages that have begun and not ended, the innermost last
        self._since = self.start  # when the innermost one began or went on

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a stage, with the device's work finished before and after."""
        self._account()  # to the stage around this one
        self._open.append(name)
        try:
            yield
        finally:
            self._account()
            self._open.pop()

    @property
    def table(self) -> dict[str, dict[str, float | None]]:
        """For each stage "seconds", and "peak_gb" (10^9 bytes; None where it is unknown), rounded to a thousandth."""
        table: dict[str, dict[str, float | None]] = {}
        for name, seconds in self.seconds.items():
            peak = self.peak_bytes[name]
            table[name] = {"seconds": round(seconds, 3), "peak_gb": None if peak is None else round(peak / 1e9, 3)}
        return table

    def total(self) -> float:
        """Seconds in all stages."""
        return sum(self.seconds.values())

    def elapsed(self) -> float:
        """Seconds since the timer was made, in and between stages."""
        return time.perf_counter() - self.start

    def _account(self) -> None:
        """Add what passed since the last call to the innermost open stage, and start again."""
        synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            peak = peak_memory(self.device)
            before = self.peak_bytes.get(name)
            self.peak_bytes[name] = peak if peak is None or before is None else max(peak, before)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._since = now


def peak_memory(device: torch.device) -> int | None:
    """Most bytes in use, or None where the system does not tell (Windows).

    On CUDA of tensors since the last reset; on MPS what torch holds now, which seldom shrinks; on a CPU the process's
    most so far.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def announced(timer: StageTimer) -> Callable[[str], AbstractContextManager[None]]:
    """The timer, which says when a stage begins for the first time, in a log; on a terminal there is a bar."""
    begun = set()

    def stage(name: str) -> AbstractContextManager[None]:
        if name not in begun and sys.stderr is not None and not sys.stderr.isatty():
            print(f"{timer.elapsed():8.1f} s  {name}", file=sys.stderr, flush=True)
        begun.add(name)
        return timer(name)

    return stage
