"""The interpreter's tests, a process a file, and every kernel compiled ahead of time, a process an architecture."""

import json
import re
from pathlib import Path

import pytest
import triton
from packaging.version import Version

from benchmarks.kernels.compile_table import stack_of
from nvit_kernels.configs import SHARED_BYTES
from tests.nvit_kernels.conftest import run_apart
from tests.nvit_kernels.test_compile_table import SAME, committed

pytestmark = pytest.mark.long
INTERPRETED = Path(__file__).parent / "interpret"
TIGHT = 128
"""Registers of a thread on sm_80 above which sm_86 may come near the 255 there are; it takes up to 46 more."""


def cases_of(arch: int) -> list[str]:
    """What to compile on `arch`, all where the list is empty.

    sm_86 and sm_89 run sm_80's instructions in less shared memory, of which the same config takes as much on each, and
    sm_89 takes what sm_86 does (`test_compile_table`). So sm_86 is left with what has few registers to spare, and
    sm_89 with some of it.
    """
    if arch not in SAME[1:]:
        return []
    tight = [name for (name, _), row in committed(80, first=True).items() if int(row["registers"]) > TIGHT]
    return tight if arch == 86 else tight[::8]


@pytest.mark.parametrize("file", sorted(path.name for path in INTERPRETED.glob("test_*.py")))
def test_under_the_interpreter(file):
    done = run_apart(["-m", "pytest", "-p", "no:cacheprovider", str(INTERPRETED / file)], TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("arch", sorted(SHARED_BYTES))
def test_every_kernel_compiles_without_spills(arch):
    names = cases_of(arch)
    done = run_apart(["-m", "nvit_kernels.aot", str(arch), *names])
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) >= (len(names) or 40), f"only {len(reports)} kernels were compiled"
    # Of an older Triton a value may wait on the stack while a loop runs, which costs next to nothing.
    stack = 0 if Version(triton.__version__) >= Version("3.8") else 16
    least = min(SHARED_BYTES[a] for a in (SAME if arch in SAME else (arch,)))  # first configs are the same on these
    for report in reports:
        most = max(stack, stack_of(report["case"]))
        assert report["spills"] <= most and report["loop_spills"] == 0, f"spills registers: {report}"
        assert report["shared"] <= least, f"over sm_{arch}'s shared memory: {report}"
