"""Measurements: `python -m benchmarks` lists the programs, the .md pages hold the figures, results/ the files."""
