"""Flags of `nvit finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ...config import FinetuneConfig, _help
from ..command import Command
from .parts import MODEL, BatchFlags, DataFlags, GeneralFlags, LogFlags, MachineFlags, ModelFlags


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand:
    """Finetune a compact model; with --scratch, train a new one."""

    model: Annotated[str, MODEL] = ""
    out: Annotated[str, _help("folder for the snapshot and result.json")] = "nvit-finetuned"
    teacher: Annotated[str, _help("the unpruned model for L_full, named as MODEL is; none if empty")] = ""
    teacher_checkpoint: Annotated[str, _help("its weights")] = ""
    new_head: Annotated[
        bool, _help("a fresh head for what --task and --data ask: as many classes as the data has, with their names")
    ] = False
    scratch: Annotated[bool, _help("start from random weights")] = False
    resume: Annotated[bool, _help("go on where an interrupted run in --out stopped")] = False
    opening: ModelFlags = field(default_factory=ModelFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)
    batch: BatchFlags = field(default_factory=BatchFlags)
    images: DataFlags = field(default_factory=DataFlags)
    config: FinetuneConfig = field(default_factory=FinetuneConfig)
    logging: LogFlags = field(default_factory=LogFlags)
    general: GeneralFlags = field(default_factory=GeneralFlags)

    @property
    def state_file(self) -> Path:
        """Beside the snapshot, which appears whole."""
        return Path(f"{Path(self.out)}_state.safetensors")

    def states(self) -> list[Path]:
        """What `--resume` would go on from."""
        return [self.state_file]


FIRST = (
    "data",
    "eval_data",
    "out",
    "epochs",
    "lr",
    "batch_size",
    "teacher",
    "new_head",
    "scratch",
    "resume",
    "device",
    "target",
)

COMMAND = Command(FinetuneCommand, "finetune", first=FIRST, ranks=True)
