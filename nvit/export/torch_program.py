"""torch.export's own file: PyTorch's graph and weights, loaded without the model's code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .base import Format, Program


class TorchProgram(Format):
    """`model.pt2`, for `torch.export.load`."""

    name, suffix, runtime = "torch", ".pt2", "torch"
    dtypes = ("float32", "float16", "bfloat16")

    def write(self, program: Program, path: Path) -> None:
        torch.export.save(program.exported, path)

    def open(self, path: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
        return torch.export.load(path).module()
