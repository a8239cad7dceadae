"""The build: what it makes where it can, and that an install never fails where it cannot."""

import os
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from nvit_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_for_tests")
CUDA_HOME = SETUP["cuda_home"]()


def run_setup(folder, before="", env=None):
    """`setup.py build` into a folder of its own, after some Python that takes things away."""
    script = f"""
        import os, runpy, sys
        {before}
        sys.argv = ["setup.py", "build", "--build-base", {str(folder)!r}]
        runpy.run_path("setup.py", run_name="__main__")
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "NVIT_BUILD_CUDA")} | (env or {})
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def built(folder):
    return sorted(p.name.split(".")[0] for p in Path(folder).rglob("*.so"))


@pytest.mark.parametrize(
    ("before", "env", "words"),
    [
        ('sys.modules["torch"] = None', {}, "no torch at build time"),
        ('os.environ["PATH"] = "/nowhere"', {}, "no C++ compiler found"),
        ("", {"CXX": shutil.which("false") or "", "NVIT_BUILD_CUDA": "0"}, "the compiler does not work"),
    ],
    ids=["no torch", "no compiler", "broken compiler"],
)
def test_install_survives_and_says_what_is_missing(tmp_path, before, env, words):
    done = run_setup(tmp_path, before, env)
    assert done.returncode == 0, done.stderr
    assert words in done.stderr
    assert built(tmp_path) == []
    assert list(tmp_path.rglob("nvit_kernels/sparse24/compress.py")), "the pure Python part is installed"


@pytest.mark.skipif(SETUP["compiler"]() is None, reason="no C++ compiler")
def test_a_library_that_does_not_compile_is_left_out(tmp_path):
    picky = tmp_path / "g++"  # answers questions about itself, compiles nothing
    picky.write_text(f'#!/bin/sh\ncase "$*" in *ops.cpp*|*isa_*) exit 1;; *) exec {SETUP["compiler"]()} "$@";; esac\n')
    picky.chmod(0o755)
    done = run_setup(tmp_path / "build", env={"CXX": str(picky), "NVIT_BUILD_CUDA": "0"})
    assert done.returncode == 0, done.stderr
    assert "nvit_kernels._C did not compile and is left out" in done.stderr
    assert built(tmp_path) == []


def test_demanding_cuda_fails_where_there_is_none(tmp_path):
    done = run_setup(tmp_path, 'sys.modules["torch"] = None', {"NVIT_BUILD_CUDA": "1"})
    assert done.returncode == 1
    assert "NVIT_BUILD_CUDA=1, but no torch at build time" in done.stderr.strip().splitlines()[-1]
    done = run_setup(tmp_path, "", {"NVIT_BUILD_CUDA": "yes"})
    assert done.returncode == 1 and "expected auto, 0 or 1" in done.stderr


def toolkit(folder, *parts):
    for part in parts:
        path = folder / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\necho release 13.0,\n")
        path.chmod(0o755)
    return folder


def test_a_toolkit_needs_compiler_and_runtime(tmp_path, monkeypatch):
    find = SETUP["cuda_home"]
    whole = toolkit(tmp_path / "whole", "bin/nvcc", "lib/libcudart.so.13")
    monkeypatch.setenv("CUDA_HOME", str(whole))
    assert find() == whole
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "no_runtime", "bin/nvcc")))
    monkeypatch.setenv("CUDA_PATH", str(whole))
    assert find() == whole
    wrapper = toolkit(tmp_path / "wrapper", "bin/nvcc")  # on PATH, its toolkit elsewhere or nowhere
    monkeypatch.setenv("PATH", f"{wrapper / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_PATH")
    assert find() not in (wrapper, tmp_path / "no_runtime")


def test_why_the_cuda_half_is_left_out(tmp_path):
    class Torch:
        __version__ = "2.11.0"

        class version:
            cuda = "12.8"

    obstacle = SETUP["cuda_obstacle"]
    home = toolkit(tmp_path, "bin/nvcc", "lib/libcudart.so")
    assert "is CUDA 13.0, torch 2.11.0 has 12.8" in obstacle(Torch, home)
    assert "no CUDA toolkit found" in obstacle(Torch, None)
    Torch.version.cuda = "13.2"
    assert obstacle(Torch, home) is None
    Torch.version.cuda = None
    assert "is a CPU build" in obstacle(Torch, home)


@pytest.mark.skipif(CUDA_HOME is None or torch.version.cuda is None, reason="no CUDA toolkit, or a CPU build of torch")
def test_cuda_half_compiles_without_spills(tmp_path):
    """For every architecture in one go; each kernel must fit its registers."""
    from torch.utils import cpp_extension

    archs = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 86, 90)]
    include = [f"-I{p}" for p in cpp_extension.include_paths()]
    define = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={SETUP['TARGET_TORCH']}"]
    command = [CUDA_HOME / "bin" / "nvcc", "-O3", "-std=c++20", "-Xptxas=-v", *archs, *define, *include]
    command += ["-Xcompiler=-fPIC", "-c", "csrc/cuda/ops.cu", "-o", tmp_path / "ops.o"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert len(spills) >= 3 * 6 * 4, "fewer kernels than formats, masks and architectures make"
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
    registers = [int(line.split("Used ")[1].split()[0]) for line in done.stderr.splitlines() if "Used " in line]
    assert max(registers) <= 64, "four blocks of 256 threads no longer fit a multiprocessor"


def sources_time():
    files = [*(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"]
    return max(f.stat().st_mtime for f in files if not f.name.endswith((".cu", ".cuh")))


def test_native_code_is_tested_where_it_was_not_built_in_place(tmp_path):
    """A machine with a compiler never passes on the plain-torch path alone."""
    library = next((ROOT / "nvit_kernels").glob("_C.*"), None)
    if _native.load().cpu and library is not None and library.stat().st_mtime >= sources_time():
        pytest.skip("built in place and fresh: the other tests have used it")
    if SETUP["compiler"]() is None:
        pytest.skip("no C++ compiler")
    done = run_setup(tmp_path, env={"NVIT_BUILD_CUDA": "0"})
    assert built(tmp_path) == ["_C"], done.stderr
    (package,) = tmp_path.glob("lib*")
    files = [ROOT / "tests" / f for f in ("csrc/test_tiles.py", "nvit_kernels/sparse24/test_compress.py")]
    # From elsewhere, so that the package just built is the one imported.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", *files]
    command += ["-k", "tiles or compiled"]
    env = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-3000:]
