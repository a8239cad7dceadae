"""Measurements behind every number that is published; `python -m benchmarks.bench_<what>` prints and writes one CSV."""
