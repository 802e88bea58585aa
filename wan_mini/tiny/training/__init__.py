"""The recipe of the tiny Wan: python -m wan_mini.tiny.training."""
