"""The committed table of what each kernel takes: complete, and within every limit."""

import csv
from pathlib import Path

from nvit_kernels import aot
from nvit_kernels.configs import SHARED_BYTES

TABLE = Path(__file__).parents[2] / "docs/kernels/compile_table.csv"


def test_the_table_has_every_kernel_config_and_architecture_and_none_spills():
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    expected = {(case.name, arch, len(case.configs(arch))) for case in aot.cases() for arch in aot.ARCHS}
    counts: dict[tuple[str, int], int] = {}
    for row in rows:
        key = (row["case"], int(row["arch"]))
        counts[key] = counts.get(key, 0) + 1
        assert int(row["spills"]) == int(row["loop_spills"]) == 0 and int(row["shared"]) <= SHARED_BYTES[key[1]], row
    assert {(*key, n) for key, n in counts.items()} == expected
