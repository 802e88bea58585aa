"""Seconds and peaks of stages, with a clock and a device that do as they are told."""

import sys

import pytest
import torch

from wan_mini.device import timing
from wan_mini.device.timing import StageTimer, peak_memory, synchronize

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class FakeDevice:
    """A clock that only `work` moves, and a CUDA device whose queued work is done when it is waited for."""

    def __init__(self, monkeypatch):
        self.now, self.queued, self.peak, self.waits = 100.0, 0.0, 0, 0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def work(self, seconds: float, peak: float) -> None:
        self.queued += seconds
        self.peak = max(self.peak, int(peak * 1e9))

    def wait(self, device: torch.device) -> None:
        assert device == CUDA
        self.now += self.queued
        self.queued = 0.0

    def reset(self, device: torch.device) -> None:
        self.peak = 0


@pytest.fixture
def gpu(monkeypatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


def test_repeated_names_add_up(gpu):
    timer = StageTimer(CUDA)
    for seconds, peak in ((1.0, 2.0), (2.5, 5.0), (0.25, 3.0)):
        with timer("denoise"):
            gpu.work(seconds, peak)
        gpu.work(10.0, 9.0)  # between stages
    assert timer.table == {"denoise": {"seconds": 3.75, "peak_gb": 5.0}}
    assert timer.total() == 3.75


def test_nested_stages_are_taken_out(gpu):
    timer = StageTimer(CUDA)
    with timer("denoise"):
        gpu.work(1.0, 4.0)
        with timer("guide"):
            gpu.work(2.0, 7.0)
            with timer("denoise"):  # the same name again, inside
                gpu.work(4.0, 1.0)
        gpu.work(8.0, 2.0)
    assert timer.table == {
        "denoise": {"seconds": 13.0, "peak_gb": 4.0},
        "guide": {"seconds": 2.0, "peak_gb": 7.0},
    }
    assert timer.total() == 15.0


def test_total_and_elapsed(gpu):
    timer = StageTimer(CUDA)
    gpu.now += 0.5
    with timer("a"):
        gpu.work(1.0, 0)
    with timer("b"):
        gpu.work(2.0, 0)
    gpu.now += 0.25
    assert (timer.total(), timer.elapsed()) == (3.0, 3.75)
    assert sum(stage["seconds"] for stage in timer.table.values()) == timer.total()


def test_a_stage_that_fails_is_counted(gpu):
    timer = StageTimer(CUDA)
    with pytest.raises(KeyError), timer("a"):
        gpu.work(1.0, 1.0)
        raise KeyError
    with timer("b"):
        gpu.work(2.0, 1.0)
    assert {name: stage["seconds"] for name, stage in timer.table.items()} == {"a": 1.0, "b": 2.0}


def test_rounded_to_a_thousandth(gpu):
    timer = StageTimer(CUDA)
    for _ in range(4):
        with timer("a"):
            gpu.work(0.0004, 0.0004)
    assert timer.table["a"] == {"seconds": 0.002, "peak_gb": 0.0}  # rounded once, not at each step


def test_mps_is_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append(True))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 10**9)
    timer = StageTimer(torch.device("mps"))
    with timer("a"):
        assert len(waits) == 1
    assert len(waits) == 2 and timer.table["a"]["peak_gb"] == 3.0


def test_cpu():
    synchronize(CPU)
    timer = StageTimer(CPU)
    with timer("a"):
        data = torch.ones(10**7)
    assert data.sum() == 10**7
    if sys.platform != "win32":
        assert 0.04 < timer.table["a"]["peak_gb"] < 100


def test_peak_is_none_where_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory(CPU) is None
    timer = StageTimer(CPU)
    for _ in range(2):
        with timer("a"):
            timer.elapsed()
    assert timer.table["a"]["peak_gb"] is None
