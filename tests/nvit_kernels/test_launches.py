"""Eager calls on edge shapes bind and compile for a real architecture, every kernel of ours among them."""

import re
from pathlib import Path

import pytest

from tests.nvit_kernels.conftest import run_apart

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_every_kernel_binds_with_what_eager_calls_pass():
    done = run_apart([str(Path(__file__).with_name("bind_launches.py"))])
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    bound = {line.split()[0] for line in done.stdout.splitlines()}
    ours = {name for path in (ROOT / "nvit_kernels/ops").glob("*/*kernels.py")
            for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}  # fmt: skip
    assert bound == ours | {"fold_kernel"}
