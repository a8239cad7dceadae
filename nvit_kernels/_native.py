"""Loads the compiled halves of this package, where they were built, and knows why not where they were not."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path

import torch

BUILD = "`pip install -e . --no-build-isolation` builds it, given torch and a C++20 compiler"


@dataclass(frozen=True)
class Native:
    """What is loaded, and a sentence for each half that is not."""

    cpu: bool
    cuda: bool
    why_not_cpu: str = ""
    why_not_cuda: str = ""


@functools.cache
def load() -> Native:
    """Load `_C` (CPU) and, beside a CUDA build of torch, `_C_cuda`; each at most once."""
    try:
        importlib.import_module("nvit_kernels._C")
    except ImportError as error:
        missing = not list(_folder().glob("_C.*"))
        why = f"nvit_kernels/_C is not built; {BUILD}" if missing else f"nvit_kernels/_C does not load: {_line(error)}"
        return Native(False, False, why, why)
    return Native(True, *_load_cuda())


def _load_cuda() -> tuple[bool, str, str]:
    if torch.version.cuda is None:
        return False, "", f"torch {torch.__version__} is a CPU build"
    library = next(_folder().glob("_C_cuda.*"), None)
    if library is None:
        return False, "", f"nvit_kernels/_C_cuda is not built; {BUILD} and a CUDA {torch.version.cuda} toolkit"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return False, "", f"nvit_kernels/_C_cuda does not load: {_line(error)}"
    return True, "", ""


def _folder() -> Path:
    return Path(__file__).parent


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
