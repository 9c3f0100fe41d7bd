"""Benchmarks. Run them from the root of the repository: `python -m bench.train`, `python -m bench.serve`, ..."""
