"""AOTInductor's package: torch.compile's kernels, compiled ahead of time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .base import Format, Program
from .to_onnx import quiet


class AotInductor(Format):
    """`model.aoti.pt2`, for `torch._inductor.aoti_load_package` and, in C++, `AOTIModelPackageLoader`. It runs on
    processors like the one it was made on."""

    name, suffix, runtime = "aoti", ".aoti.pt2", "torch"
    dtypes = ("float32", "float16", "bfloat16")

    def refusal(self) -> str | None:
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        if any(shutil.which(c) for c in compilers):
            return None
        return f"no C++ compiler ({' or '.join(compilers)}) is there; install g++, or set CXX to yours"

    def write(self, program: Program, path: Path) -> None:
        from torch._inductor import aoti_compile_and_package

        with quiet():
            aoti_compile_and_package(program.exported, package_path=str(path))

    def open(self, path: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
        from torch._inductor import aoti_load_package

        with quiet():
            return aoti_load_package(str(path))
