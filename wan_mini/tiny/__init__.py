"""Wan 2.1's architecture small enough for a laptop."""
