"""Benchmarks as data: see `tests.bench.table`. Run them all with `python -m tests.bench`."""
