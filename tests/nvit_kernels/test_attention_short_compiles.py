"""Attention over short rows, compiled ahead of time: what is offered spills nothing and fits in shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvit_kernels.configs import SHARED_BYTES
from nvit_kernels.ops.attention.short_layouts import backward_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arch", sorted(SHARED_BYTES))
def test_what_is_offered_spills_nothing_and_fits(arch):
    """In a process of its own, without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "nvit_kernels.ops.attention.short_cases", str(arch)], cwd=ROOT,
                          capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) >= 14, f"only {len(reports)} layouts were compiled"
    for report in reports:
        assert report["spills"] == 0, f"spills registers: {report}"
        assert report["shared"] <= SHARED_BYTES[arch], f"over sm_{arch}'s shared memory: {report}"
        assert report["warps_per_processor"] >= 8, f"too few warps at once: {report}"


def test_what_is_not_offered_is_the_widest_backward_where_shared_memory_is_small():
    shapes = [(tokens, qk, v) for tokens in (50, 128, 197) for qk, v in ((64, 64), (24, 56), (64, 32), (8, 8))]
    missing = {(arch, *shape) for arch in SHARED_BYTES for shape in shapes if backward_config(arch, *shape) is None}
    assert missing == {(86, 197, 64, 64), (89, 197, 64, 64)}
