"""One question each, with its hypothesis written down before any run; python -m benchmarks lists them."""
