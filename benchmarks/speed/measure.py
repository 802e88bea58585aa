"""How one call is measured: seconds, their spread, peak memory, and the ratio to a reference.

A call is run once to warm up and then repeated: the median of the seconds counts, with the device's work finished
before the clock stops. On a CPU a short call and its reference alternate, and the ratio is the median over the pairs:
a shared machine drifts by more than some rows differ. (On a GPU a call would find the allocator's cache as the other
left it.) The peak is the most memory that the call's tensors hold at once beyond what was held before it. A GPU
reports it; on a CPU it is read from the profiler's list of allocations, during the warm-up, so that it costs no time.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from wan_mini.device.memory import free_memory

Call = Callable[[], Any]
ENOUGH = 30.0  # seconds of timed calls, the reference's included, after which the repeats so far must do


@dataclass(frozen=True)
class Cost:
    """What one call cost."""

    seconds: float  # the median
    spread: float | None  # half the range of the seconds, as a share of the median; None after a single repeat
    repeats: int
    peak_gb: float | None  # 10^9 bytes; None where the device does not report it
    ratio: float | None  # median of call / reference over the pairs; None without a reference


def measure(call: Call, device: torch.device, repeats: int, reference: Call | None = None) -> Cost:
    """Measure a call after a warm-up; reference: another call, already warm, that runs before each repeat."""
    backend = torch.get_device_module(device)
    reports_memory = hasattr(backend, "max_memory_allocated")
    peak: int | None = None
    if device.type == "cpu":
        peak = logged_peak(call)
    else:
        call()
    seconds: list[float] = []
    reference_seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) + sum(reference_seconds) < ENOUGH:
        if reference is not None:
            reference_seconds.append(stopwatch(reference, backend))
        if reports_memory:
            before = backend.memory_allocated()
            backend.reset_peak_memory_stats()
        seconds.append(stopwatch(call, backend))
        if reports_memory:
            peak = max(peak or 0, backend.max_memory_allocated() - before)
    median, spread = median_and_spread(seconds)
    ratio = None
    if reference is not None:
        ratios = [a / b for a, b in zip(seconds, reference_seconds, strict=True)]
        ratio = statistics.median(ratios)
    return Cost(median, spread, len(seconds), None if peak is None else peak / 1e9, ratio)


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float | None]:
    """The median, and half the range as a share of it; None if there is one value only."""
    median = statistics.median(seconds)
    if len(seconds) == 1:
        return median, None
    return median, (max(seconds) - min(seconds)) / 2 / median


def stopwatch(call: Call, backend: Any) -> float:
    """Seconds of a call, with the device's work finished before and after."""
    backend.synchronize()
    start = time.perf_counter()
    call()
    backend.synchronize()
    return time.perf_counter() - start


def logged_peak(call: Call) -> int:
    """Most bytes that a call's tensors held at once on a CPU, by the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports its own stages between the tables
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events]  # below 0 where memory is freed
    return max(accumulate(changes, initial=0))


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Exponent p of a growth cost ~ n^p: slope of a straight line through the logarithms of (n, cost)."""
    n, cost = np.log(points).T  # (points, 2) -> 2 x (points,)
    return np.polyfit(n, cost, 1)[0].item()


def available_bytes(device: torch.device) -> int:
    """Memory that new tensors may take; a CPU has no error to catch when it runs out."""
    free = free_memory(device)
    if free is None:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of a - b over the norm of b."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()
