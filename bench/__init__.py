"""Benchmarks: `python -m bench NAME [options]`; rows are appended to bench/results/NAME.csv."""
