"""Attention over short rows, compiled ahead of time: what is offered spills nothing and fits in shared memory."""

import json

import pytest

from nvit_kernels.configs import SHARED_BYTES
from nvit_kernels.ops.attention.short_cases import cases
from nvit_kernels.ops.attention.short_layouts import backward_config
from tests.nvit_kernels.conftest import run_apart

WAITING_BYTES = 8  # of stack a thread, outside loops: with a mass, 50 keys of 32 dims on sm_80 keep one value there


@pytest.mark.long
@pytest.mark.parametrize("arch", sorted(SHARED_BYTES.keys() - {89}))
def test_what_is_offered_spills_nothing_and_fits(arch):
    """In a process of its own, without the interpreter. sm_89 takes of every kernel what sm_86 does."""
    done = run_apart(["-m", "nvit_kernels.ops.attention.short_cases", str(arch)])
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) >= 14, f"only {len(reports)} layouts were compiled"
    for report in reports:
        waits = WAITING_BYTES if report["case"].endswith("mass") else 0
        assert report["loop_spills"] == 0 and report["spills"] <= waits, f"spills registers: {report}"
        assert report["shared"] <= SHARED_BYTES[arch], f"over sm_{arch}'s shared memory: {report}"
        assert report["warps_per_processor"] >= 8, f"too few warps at once: {report}"


def test_what_is_not_offered_is_the_widest_backward_where_shared_memory_is_small():
    shapes = [(tokens, qk, v) for tokens in (50, 128, 197) for qk, v in ((64, 64), (24, 56), (64, 32), (8, 8))]
    missing = {(arch, *shape) for arch in SHARED_BYTES for shape in shapes if backward_config(arch, *shape) is None}
    assert missing == {(86, 197, 64, 64), (89, 197, 64, 64)}


def test_one_architecture_is_offered_what_the_other_of_its_kind_is():
    offered = [[(case.name, case.constants, str(options)) for case, options in cases(arch)] for arch in (86, 89)]
    assert offered[0] == offered[1] and SHARED_BYTES[86] == SHARED_BYTES[89]
