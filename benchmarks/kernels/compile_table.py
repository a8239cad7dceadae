"""Compile every kernel, config and architecture ahead of time and write what each takes.

    python -m benchmarks.kernels.compile_table docs/kernels/compile_table.csv

Needs no GPU. Ends with a non-zero code when a config spills in a loop or much at all, or asks for more shared memory
than its architecture has.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import asdict, fields
from pathlib import Path

from nvit_kernels import aot
from nvit_kernels.configs import SHARED_BYTES

STACK_BYTES = {"merge tokens match": 24}
"""What may wait on a thread's stack outside loops, by how a case begins: of others nothing. Next to nothing here, where
the alternative is a slower tile."""


def stack_of(case: str) -> int:
    """Bytes that a case may keep on a thread's stack outside loops."""
    return next((most for begins, most in STACK_BYTES.items() if case.startswith(begins)), 0)


def write_table(path: Path) -> int:
    """Write the table to `path`; returns how many rows are over a limit."""
    over = 0
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [f.name for f in fields(aot.Report)], lineterminator="\n")
        table.writeheader()
        for case in aot.cases():
            for arch in aot.ARCHS:
                for config in case.configs(arch):
                    report = aot.compile_case(case, arch, config)
                    table.writerow(asdict(report))
                    stack, shared = stack_of(report.case), SHARED_BYTES[arch]
                    if report.loop_spills or report.spills > stack or report.shared > shared:
                        over += 1
                        print(f"over a limit: {report}", file=sys.stderr)
    return over


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the CSV to write")
    return 1 if write_table(parser.parse_args().path) else 0


if __name__ == "__main__":
    sys.exit(main())
