"""Builds the 2:4 sparsity extension where it can; where it cannot, installs pure Python and says what is missing.

NVIT_BUILD_CUDA chooses the CUDA half: `auto` (the default: when a toolkit that fits torch is found), `0` (never) or `1`
(fail when it cannot be built).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

TARGET_TORCH = "0x020b000000000000"  # 2.11: the oldest torch whose stable interface the code uses
CUDA_ARCHS = "8.0;8.6;9.0+PTX"
AGAIN = "then run `pip install -e . --no-build-isolation` again"
REPOSITORY = Path(__file__).resolve().parent


def say(text: str) -> None:
    print(f"nvit: {text}", file=sys.stderr)


def compiler() -> str | None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def cudart_in(home: Path) -> bool:
    folders = ("lib64", "lib", "lib/x64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    return any(next((home / folder).glob("libcudart.so*"), None) for folder in folders)


def cuda_home() -> Path | None:
    """The first toolkit that holds both nvcc and the runtime library.

    An nvcc found on PATH may be a wrapper that lives far from its toolkit, so it counts only where the library is too.
    """
    on_path = shutil.which("nvcc")
    package = importlib.util.find_spec("nvidia")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [Path(on_path).resolve().parent.parent] if on_path else []
    candidates += ["/usr/local/cuda", *sorted(Path("/usr/local").glob("cuda-*"), reverse=True), "/opt/cuda"]
    candidates += [Path(p) / "cu13" for p in package.submodule_search_locations] if package else []
    homes = (Path(c) for c in candidates if c)
    return next((h for h in homes if (h / "bin" / "nvcc").exists() and cudart_in(h)), None)


def nvcc_release(home: Path) -> tuple[int, int] | None:
    try:
        text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def cuda_obstacle(torch, home: Path | None) -> str | None:
    """Why the CUDA half cannot be built, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build; install a CUDA build of torch, {AGAIN}"
    if home is None:
        return f"no CUDA toolkit found; install one for CUDA {torch.version.cuda} or set CUDA_HOME, {AGAIN}"
    release = nvcc_release(home)
    if release is None:
        return f"{home}/bin/nvcc does not run; mend the toolkit or set CUDA_HOME to another, {AGAIN}"
    if release[0] != int(torch.version.cuda.split(".")[0]):
        found = f"{home} is CUDA {release[0]}.{release[1]}, torch {torch.__version__} has {torch.version.cuda}"
        return f"{found}; set CUDA_HOME to a toolkit of torch's major version, {AGAIN}"
    return None


def extensions(cpp, with_cuda: bool) -> list:
    macros = [("TORCH_TARGET_VERSION", TARGET_TORCH)]
    cxx = ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden"]
    sources = ["csrc/ops.cpp", "csrc/merge_tokens.cpp"]
    sources += [f"csrc/cpu/isa_{isa}.cpp" for isa in ("baseline", "avx2", "avx512")]
    headers = sorted(str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "csrc").rglob("*.h*"))
    common = {"py_limited_api": True, "define_macros": macros, "extra_link_args": ["-s"], "optional": True}
    built = [cpp.CppExtension("nvit_kernels._C", sources, extra_compile_args=cxx, depends=headers, **common)]
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        flags = {
            "cxx": [*cxx, "-DUSE_CUDA"],
            "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"],
        }
        headers = [*headers, "csrc/cuda/kernels.cuh"]
        built.append(
            cpp.CUDAExtension(
                "nvit_kernels._C_cuda", ["csrc/cuda/ops.cu"], extra_compile_args=flags, depends=headers, **common
            )
        )
    return built


def build_command(cpp, cuda_demanded: bool) -> type:
    """torch's build_ext, but a library that fails to compile is left out, unless it was asked for by name."""

    class Build(cpp.BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if cuda_demanded:
                    raise
                say(f"no native code, the compiler does not work: {str(error).splitlines()[0]}")

        def build_extension(self, ext) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                if cuda_demanded and ext.name.endswith("_cuda"):
                    raise
                say(f"{ext.name} did not compile and is left out: {str(error).splitlines()[0]}")

    return Build


def native_obstacle() -> str | None:
    """Why no native code can be built at all, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"no torch at build time, so no native code; install torch, {AGAIN}"
    if compiler() is None:
        return f"no C++ compiler found, so no native code; install g++ 10 or newer, {AGAIN}"
    return None


def native_build() -> dict:
    """setup()'s arguments for the native code; empty where it cannot be built."""
    wanted = os.environ.get("NVIT_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"nvit: NVIT_BUILD_CUDA is {wanted!r}, expected auto, 0 or 1.")
    obstacle = native_obstacle()
    without_native = obstacle is not None
    if not without_native:
        home = cuda_home()
        if home is not None:
            os.environ["CUDA_HOME"] = str(home)  # before cpp_extension looks for itself
        import torch
        from torch.utils import cpp_extension as cpp

        obstacle = cuda_obstacle(torch, home) if wanted != "0" else None
    if obstacle is not None:
        if wanted == "1":
            raise SystemExit(f"nvit: NVIT_BUILD_CUDA=1, but {obstacle}.")
        say(f"{obstacle}.")
    if without_native:
        return {}
    return {
        "ext_modules": extensions(cpp, with_cuda=wanted != "0" and obstacle is None),
        "cmdclass": {"build_ext": build_command(cpp, cuda_demanded=wanted == "1")},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**native_build())
