"""Measures of a generated clip beside its true motion: how whole, how steady, how lively, and by whose formula."""
