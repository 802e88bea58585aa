"""Where a model runs: device and dtype, memory, offloading, time."""
