"""Time and memory of every part, each beside a reference in the same process: one program per table.

python -m benchmarks.speed.gradient --size small      # one table
python -m benchmarks.speed --device cpu               # all of them; random weights made in place, nothing is downloaded
"""
