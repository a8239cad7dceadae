"""Each kernel beside its peers: one file an op with its cases, `python -m benchmarks.kernels` for all."""
