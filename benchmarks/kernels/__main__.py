"""Measure kernels beside their peers and keep rows and figures.

python -m benchmarks.kernels                        every op
python -m benchmarks.kernels attention mlp          these
python -m benchmarks.kernels --gate attention       whether results are right; nothing is timed
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks import harness

OPS = ("group_dot", "kept_layer_norm", "attention", "mlp", "model")


def gate(op: str) -> None:
    """Run every provider of an op once, which also fills the compilers' caches, and print what is not timed and why."""
    module = import_module(f"benchmarks.kernels.{op}")
    cases = [case for case, _ in module.cases()] if op == "model" else module.cases()
    for case in cases:
        right, rows = harness.gate(case)
        print(f"{case.name}: right: {', '.join(right) or 'none'}")
        for row in rows:
            print(f"{case.name}: {row.provider}: {row.note}")


def measure(op: str, out: Path | None) -> None:
    """Time an op and write its CSV and figure."""
    module = import_module(f"benchmarks.kernels.{op}")
    rows = harness.run(measured=module.rows()) if op == "model" else harness.run(module.cases())
    print(harness.save(rows, op, out))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument("--gate", action="store_true", help="check results, time nothing")
    parser.add_argument("--out", type=Path, help="folder for CSV and figures; benchmarks/results by default")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops).difference(OPS):
        parser.error(f"unknown ops {sorted(unknown)}; there are {', '.join(OPS)}")
    for op in arguments.ops or OPS:
        start = time.perf_counter()
        if arguments.gate:
            gate(op)
        else:
            measure(op, arguments.out)
        print(f"{op}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
