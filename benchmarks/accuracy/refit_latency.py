"""Measured latency of the models of `refit_peers` and `refit_global`, as shares of the dense model's; one CPU thread.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.refit_latency [--images 256] [--seconds 5]

The same choices from the same calibration images, no refit: it leaves the widths, and so the latency, as they are. The
models of a point and the dense one are timed in turn, three times over: the median of the three shares, and their
range. Writes refit_latency_cpu.csv in benchmarks/results. Needs `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch

from benchmarks import harness
from benchmarks.accuracy.library import INPUT, Bench, data_folder
from benchmarks.accuracy.peers import POINTS, Peers
from nvit.latency.clock import time_models

OURS_ALONE = (("all", 0.9), ("all", 0.5))
"""Points of refit_global_cpu.csv that have no peers."""
BATCH = 8


def at(bench: Peers, case: str, target: float, seconds: float, records: harness.Records) -> None:
    """Rows of every method at one share of MACs."""
    models = {} if (case, target) in OURS_ALONE else dict(bench.theirs(case, target))
    models["ours"] = bench.bench.pruned(bench.masks(case, target), refit=False)
    images = torch.randn(BATCH, *INPUT, generator=torch.Generator().manual_seed(0))
    rounds = []
    for _ in range(3):
        dense, *times = time_models([bench.bench.plain, *(m.eval() for m in models.values())], images, seconds)
        rounds.append([ms / dense for ms in times])
    for method, shares in zip(models, zip(*rounds, strict=True), strict=True):
        found = {"latency": statistics.median(shares), "latency_low": min(shares), "latency_high": max(shares)}
        records.add(case=case, target=target, method=method, batch=BATCH, **found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, three times a point")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench, records = Peers(Bench(data_folder(), args.images, 50)), harness.Records("refit_latency")
    for case, target in (*POINTS, *OURS_ALONE):
        at(bench, case, target, args.seconds, records)
    records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
