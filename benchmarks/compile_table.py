"""Compile every kernel, config and architecture ahead of time and write what each takes.

    python -m benchmarks.compile_table docs/kernels/compile_table.csv

Needs no GPU. Ends with a non-zero code when a config spills, or asks for more shared memory than its architecture has.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict, fields
from pathlib import Path

from nvit_kernels import aot
from nvit_kernels.configs import SHARED_BYTES


def main(path: Path) -> int:
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
                    if report.spills or report.shared > SHARED_BYTES[arch]:
                        over += 1
                        print(f"over a limit: {report}", file=sys.stderr)
    return over


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1])) else 0)
