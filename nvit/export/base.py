"""What a format is, and what it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INPUT, OUTPUT = "images", "logits"
"""Names of a file's input and output."""

OPSET = 20
"""Of ONNX, where nobody asks for another."""

EXTERNAL_BYTES = 1_900_000_000
"""Weights of more bytes go into a file beside an ONNX model: a protobuf message holds 2 GB."""


@dataclass(frozen=True)
class Program:
    """A model as torch.export has read it, and how it is written.

    Attributes:
        exported: images `(batch, channels, height, width)` to logits.
        opset: of ONNX.
        external_bytes: weights of more bytes lie in a file beside an ONNX model.
    """

    exported: torch.export.ExportedProgram
    opset: int = OPSET
    external_bytes: int = EXTERNAL_BYTES

    @cached_property
    def onnx(self) -> torch.onnx.ONNXProgram:
        """The same in ONNX; converted once, for whichever formats are made of it.

        Raises:
            ValueError: the opset has not all operations, or this version of torch does not write it.
        """
        from .to_onnx import to_onnx

        return to_onnx(self.exported, (), self.opset, [INPUT], [OUTPUT])


class Format(ABC):
    """A file that another runtime reads.

    Attributes:
        name: as `--format` knows it.
        suffix: of the file, which is `model` and this.
        runtime: what runs the file.
        packages: that have to be installed, of the extra `extra`.
        dtypes: of weights and images that it can have.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    runtime: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "export"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16")

    def refusal(self) -> str | None:
        """Why it cannot be written on this machine, or None."""
        return None

    @abstractmethod
    def write(self, program: Program, path: Path) -> None:
        """Write a program to `path`; whatever else belongs to it goes beside it, under names that begin alike."""

    @abstractmethod
    def open(self, path: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
        """A written file in its own runtime, as a function of images on tensors of the CPU, on so many threads."""

    def version(self) -> str:
        """Of the runtime, for a table's title."""
        from importlib.metadata import version

        return f"{self.runtime} {version(self.runtime)}"
