"""Run what needs a process of its own: tests under the interpreter, and ahead-of-time compilation without it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INTERPRETED = sorted(path.name for path in (HERE / "interpret").glob("test_*.py"))
ARCHS = (80, 86, 89, 90, 100)


def pytest_ignore_collect(collection_path):
    """Files under interpret/ belong to the processes started below, where the interpreter is on."""
    if collection_path.is_relative_to(HERE / "interpret") and os.environ.get("TRITON_INTERPRET") != "1":
        return True


def run_apart(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, without the interpreter unless the environment says so."""
    base = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join(p for p in (str(ROOT), base.get("PYTHONPATH")) if p)
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env={**base, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment})  # fmt: skip


@pytest.fixture(scope="session")
def processes(request):
    """Results by file name or architecture, of those that the selected tests ask for; two at a time."""
    wanted = {getattr(item, "callspec", None) and item.callspec.params.get("process") for item in request.session.items}
    with ThreadPoolExecutor(2) as pool:
        files = {name: pool.submit(run_apart, ["-m", "pytest", "-p", "no:cacheprovider", f"{HERE}/interpret/{name}"],
                                   TRITON_INTERPRET="1") for name in INTERPRETED if name in wanted}  # fmt: skip
        archs = {
            arch: pool.submit(run_apart, ["-m", "nvit_kernels.aot", str(arch)]) for arch in ARCHS if arch in wanted
        }
        yield files | archs
