"""Run what needs a process of its own: tests under the interpreter, and ahead-of-time compilation without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def pytest_ignore_collect(collection_path):
    """Files under interpret/ belong to the processes started below, where the interpreter is on."""
    if collection_path.is_relative_to(HERE / "interpret") and os.environ.get("TRITON_INTERPRET") != "1":
        return True


@pytest.fixture
def nan_filled_memory():
    """Every uninitialised float is NaN, so an element that no kernel wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run_apart(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, without the interpreter unless the environment says so."""
    base = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join(p for p in (str(ROOT), base.get("PYTHONPATH")) if p)
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env={**base, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment})  # fmt: skip
