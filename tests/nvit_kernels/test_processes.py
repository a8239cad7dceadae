"""The interpreter's tests, a process a file, and every kernel compiled for every architecture, a process each."""

import json
import re
from pathlib import Path

import pytest
import triton
from packaging.version import Version

from nvit_kernels.configs import SHARED_BYTES

FILES = sorted(path.name for path in (Path(__file__).parent / "interpret").glob("test_*.py"))


@pytest.mark.parametrize("process", FILES)
def test_under_the_interpreter(process, processes):
    done = processes[process].result()
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("process", sorted(SHARED_BYTES))
def test_every_kernel_compiles_without_spills(process, processes):
    done = processes[process].result()
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) >= 40, f"only {len(reports)} kernels were compiled"
    # Of an older Triton a value may wait on the stack while a loop runs, which costs next to nothing.
    stack = 0 if Version(triton.__version__) >= Version("3.8") else 16
    for report in reports:
        assert report["spills"] <= stack and report["loop_spills"] == 0, f"spills registers: {report}"
        assert report["shared"] <= SHARED_BYTES[process], f"over sm_{process}'s shared memory: {report}"
