"""Flags of `nvit export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ...config import TaskName, _help
from ...export.base import EXTERNAL_BYTES, OPSET
from ...export.registry import FORMATS, check_names
from ..command import Command
from .parts import MODEL, DataFlags, GeneralFlags, MachineFlags, ModelFlags

FORMAT = _help(f"files to write, some of: {', '.join(FORMATS)}")


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a compact model for another runtime, checked there first."""

    model: Annotated[str, MODEL] = ""
    format: Annotated[tuple[str, ...], FORMAT] = ("onnx",)
    dynamic_batch: Annotated[bool, _help("a file for any number of images")] = True
    static_batch: Annotated[int, _help("a file for batches of exactly so many images; 0: for any number")] = 0
    opset: Annotated[int, _help("of ONNX, which OpenVINO's files are made of too")] = OPSET
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], _help("of weights and images; bfloat16 in torch and aoti alone")
    ] = "float32"
    external_mb: Annotated[float, _help("ONNX weights of more MB lie in a file beside the model, 2 GB at most")] = (
        EXTERNAL_BYTES / 1e6
    )
    seconds: Annotated[float, _help("time for measuring each file in its runtime; 0 for none")] = 2.0
    task: TaskName = "auto"
    out: Annotated[str, _help("folder for the files and result.json")] = "nvit-export"
    opening: ModelFlags = field(default_factory=ModelFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)
    where: DataFlags = field(default_factory=DataFlags)
    general: GeneralFlags = field(default_factory=GeneralFlags)

    def check(self) -> None:
        """Raise ValueError where a value makes no sense."""
        check_names(self.format)
        if self.static_batch < 0:
            raise ValueError(f"static_batch {self.static_batch} is no number of images")
        if not self.dynamic_batch and not self.static_batch:
            raise ValueError("--no-dynamic-batch needs the number of images a batch: --static-batch N")
        if not 0 < self.external_mb <= 2000:
            raise ValueError(
                f"external_mb {self.external_mb:g} is not between 0 and 2000, which is what one file holds"
            )
        if self.machine.device not in ("", "cpu"):
            raise ValueError(f"--device {self.machine.device}: files are made and checked on the CPU; leave it out")


COMMAND = Command(
    ExportCommand,
    "export",
    first=("format", "data", "static_batch", "opset", "dtype", "out", "target"),
)
