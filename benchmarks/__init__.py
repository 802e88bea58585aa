"""Measurements: `python -m benchmarks` lists the programs, README.md holds the figures, results/ the files."""
