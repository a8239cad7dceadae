"""The committed table of what each kernel takes: complete, and within every limit."""

import csv
from pathlib import Path

from benchmarks.kernels.compile_table import stack_of
from nvit_kernels import aot
from nvit_kernels.configs import SHARED_BYTES

TABLE = Path(__file__).parents[2] / "docs/kernels/compile_table.csv"
SAME = (80, 86, 89)
"""Architectures of one instruction set, which differ in shared memory."""


def rows() -> list[dict[str, str]]:
    with TABLE.open() as file:
        return list(csv.DictReader(file))


def committed(arch: int, first: bool = False) -> dict[tuple[str, str], dict[str, str]]:
    """Rows of an architecture by case and config, of each case's first config alone if asked."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    seen: set[str] = set()
    for row in rows():
        if int(row["arch"]) == arch and not (first and row["case"] in seen):
            seen.add(row["case"])
            found[row["case"], row["config"]] = row
    return found


def test_the_table_has_every_kernel_config_and_architecture_and_none_spills_in_a_loop():
    expected = {(case.name, arch, len(case.configs(arch))) for case in aot.cases() for arch in aot.ARCHS}
    counts: dict[tuple[str, int], int] = {}
    for row in rows():
        key = (row["case"], int(row["arch"]))
        counts[key] = counts.get(key, 0) + 1
        assert int(row["loop_spills"]) == 0 and int(row["spills"]) <= stack_of(row["case"]), row
        assert int(row["shared"]) <= SHARED_BYTES[key[1]], row
    assert {(*key, n) for key, n in counts.items()} == expected


def test_of_one_instruction_set_a_config_takes_the_same_shared_memory_and_two_the_same_registers():
    """What allows the tests to compile little for sm_86 and less for sm_89."""
    of_80, of_86, of_89 = (committed(arch) for arch in SAME)
    assert of_86.keys() == of_89.keys() <= of_80.keys()
    for key, row in of_86.items():
        assert row["shared"] == of_80[key]["shared"], key
        assert {**row, "arch": "89", "cubin_bytes": of_89[key]["cubin_bytes"]} == of_89[key], key
    for case in aot.cases():
        assert str(case.configs(80)[0]) == str(case.configs(86)[0]) == str(case.configs(89)[0]), case.name
