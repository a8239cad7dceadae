"""Measurements behind every number that is published: `kernels` beside their peers, the `engine`'s cost, `accuracy`.

`python -m benchmarks.engine.decision` prints its rows and writes a CSV into `results/`; `python -m benchmarks.kernels`
does so for every kernel, `python -m benchmarks.gpu` for all that a GPU shows. Nothing but its tests imports this.
"""
