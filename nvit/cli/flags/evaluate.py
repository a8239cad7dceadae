"""Flags of `nvit evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ...config import FeaturesName, TaskName, _help
from ..command import Command
from .parts import MODEL, BatchFlags, DataFlags, GeneralFlags, MachineFlags, ModelFlags


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Accuracy (top-1 and top-5, or what else the task has), and images per second."""

    model: Annotated[str, MODEL] = ""
    task: TaskName = "auto"
    features: FeaturesName = "auto"
    reference: Annotated[
        str,
        _help(
            "the unpruned tower, named as MODEL is, for the cosine of task features; its k-NN and linear probe know "
            "class folders of --data and are asked about those of --eval-data"
        ),
    ] = ""
    batch_size: Annotated[int, _help("images a batch")] = 64
    amp: Annotated[Literal["no", "bf16", "fp16"], _help("mixed precision")] = "no"
    compile: Annotated[bool, _help("through torch.compile, once; images/s are those of the compiled model")] = False
    out: Annotated[str, _help("folder for result.json; none if empty")] = ""
    opening: ModelFlags = field(default_factory=ModelFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)
    batch: BatchFlags = field(default_factory=BatchFlags)
    images: DataFlags = field(default_factory=DataFlags)
    general: GeneralFlags = field(default_factory=GeneralFlags)


FIRST = ("data", "eval_data", "task", "reference", "features", "batch_size", "amp", "out", "device", "target")

COMMAND = Command(EvaluateCommand, "evaluate", first=FIRST)
