"""Benchmarks. Run them from the root of the repository: `python -m bench.run`, `python -m bench.serving.serve`, ..."""
