"""Joules of a piece of work, from the counters of processors (RAPL) and NVIDIA GPUs (NVML) where they are readable."""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts from its making on, all packages and GPUs of the machine, whoever uses them."""

    def __init__(self, folder: Path = POWERCAP):
        self.packages = sorted(folder.glob("intel-rapl:[0-9]"))  # AMD's are under this name, too
        self.start = self.read()

    def read(self) -> dict[str, float] | None:
        """Joules of each counter; None if there is none that this user may read."""
        joules = nvidia_joules()
        try:
            for package in self.packages:
                joules[str(package)] = int((package / "energy_uj").read_text()) / 1e6
        except OSError:
            return None
        return joules or None

    def joules(self) -> float:
        """Since the start; NaN where nothing can be read."""
        now = self.read()
        if now is None or self.start is None:
            return float("nan")
        total = 0.0
        for name, joules in now.items():
            spent = joules - self.start[name]
            if spent < 0:  # the counter began again at 0
                spent += int((Path(name) / "max_energy_range_uj").read_text()) / 1e6
            total += spent
        return total


def nvidia_joules() -> dict[str, float]:
    """Joules of each NVIDIA GPU since its driver was loaded; none without pynvml or a GPU."""
    try:
        import pynvml
    except ImportError:
        return {}
    joules = {}
    try:
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            joules[f"GPU {number}"] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except pynvml.NVMLError:
        return {}
    return joules
