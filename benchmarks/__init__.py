"""Time and memory of every part, each beside a reference in the same process: one script per table.

python -m benchmarks.gradient --size small      # one table
python -m benchmarks --device cpu               # all of them; random weights made in place, nothing is downloaded
"""
