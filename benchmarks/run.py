"""Run benchmarks and keep their rows and figures.

python -m benchmarks.run --all
python -m benchmarks.run --only attention mlp
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from pathlib import Path

from benchmarks import harness

OPS = ("group_dot", "kept_layer_norm", "attention", "mlp", "model")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the kernels beside their peers on this device.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every benchmark")
    which.add_argument("--only", nargs="+", choices=OPS, help="these benchmarks")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for CSV and figures")
    arguments = parser.parse_args()
    for op in OPS if arguments.all else arguments.only:
        start, module = time.perf_counter(), import_module(f"benchmarks.bench_{op}")
        rows = harness.run(measured=module.rows()) if op == "model" else harness.run(module.cases())
        path = harness.save(rows, op, arguments.out)
        print(f"{op}: {time.perf_counter() - start:.0f} s, {path}")


if __name__ == "__main__":
    main()
