"""Flags of `nvit compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...config import TaskName, _help
from ..command import Command
from .parts import MODEL, DataFlags, GeneralFlags, LatencyFlags, MachineFlags, ModelFlags


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Size, latency, memory and accuracy of models, side by side."""

    models: Annotated[tuple[str, ...], MODEL] = ()
    task: TaskName = "auto"
    batch_size: Annotated[int, _help("images a batch while evaluating")] = 64
    seconds: Annotated[float, _help("time for measuring latency, all models in turn")] = 20.0
    out: Annotated[str, _help("folder for result.json and compare.csv; none if empty")] = ""
    opening: ModelFlags = field(default_factory=ModelFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)
    images: DataFlags = field(default_factory=DataFlags)
    latency: LatencyFlags = field(default_factory=LatencyFlags)
    general: GeneralFlags = field(default_factory=GeneralFlags)


COMMAND = Command(CompareCommand, "compare", first=("data", "eval_data", "out", "device", "seconds", "target"))
