"""What a program needs around a model: its command line, the files of a run, their provenance, a preview."""
