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

OPS = ("group_dot", "kept_layer_norm", "attention", "mlp", "merge_tokens", "model")


def gate(op: str) -> None:
    """Run every provider of an op once, which also fills the compilers' caches, and print what is not timed and why."""
    module = import_module(f"benchmarks.kernels.{op}")
    cases = [case for case, _ in module.cases()] if op == "model" else module.cases()
    for case in cases:
        right, rows = harness.gate(case)
        print(f"{case.name}: right: {', '.join(right) or 'none'}", flush=True)
        for row in rows:
            print(f"{case.name}: {row.provider}: {row.note}")


def measure(op: str, out: Path | None) -> int:
    """Time an op case by case and write its CSV after each; how many cases of ours were wrong or broke."""
    module = import_module(f"benchmarks.kernels.{op}")
    if op == "model":
        print(harness.save(harness.run(measured=module.rows()), op, out))
        return 0
    rows: list[harness.Row] = []
    failed = 0
    for case in (*harness.ceilings(), *module.cases()):
        try:
            found = harness.measure(case)
        except Exception as error:  # the other cases are measured all the same
            failed += 1
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            found = [harness.Row(case=case.name, provider=harness.OURS, note=f"not timed: {reason[:160]}")]
        rows += found
        for row in found:
            ms = row.note if row.median_ms is None else f"{row.median_ms} ms, host {row.host_ms} ms, {row.note}"
            print(f"{row.case}: {row.provider}: {ms}", flush=True)
        harness.write(harness.path_of(op, out), rows)
    print(harness.save(rows, op, out))
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument("--gate", action="store_true", help="check results, time nothing")
    parser.add_argument("--out", type=Path, help="folder for CSV and figures; benchmarks/results by default")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops).difference(OPS):
        parser.error(f"unknown ops {sorted(unknown)}; there are {', '.join(OPS)}")
    failed = 0
    for op in arguments.ops or OPS:
        start = time.perf_counter()
        if arguments.gate:
            gate(op)
        else:
            failed += measure(op, arguments.out)
        print(f"{op}: {time.perf_counter() - start:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
