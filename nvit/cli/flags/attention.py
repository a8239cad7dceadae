"""Flags of `nvit analyze attention`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...config import TaskName, _help
from ...utils.settings import check_at_least_one, check_choices
from ..command import Command
from .parts import MODEL, DataFlags, GeneralFlags, MachineFlags, ModelFlags


@dataclass(frozen=True, kw_only=True)
class AttentionCommand:
    """How different the heads of every block are, models side by side (App. C.1)."""

    models: Annotated[tuple[str, ...], MODEL] = ()
    task: TaskName = "auto"
    samples: Annotated[int, _help("images, evenly over the data")] = 256
    batch_size: Annotated[int, _help("images at once; an attention map of each head is in memory")] = 16
    out: Annotated[str, _help("folder for attention.csv, attention.png and result.json")] = "nvit-attention"
    opening: ModelFlags = field(default_factory=ModelFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)
    images: DataFlags = field(default_factory=DataFlags)
    general: GeneralFlags = field(default_factory=GeneralFlags)

    def check(self) -> None:
        """Raise ValueError where a value makes no sense."""
        check_choices(self)
        check_at_least_one(self, "samples", "batch_size")
        if self.images.eval_images:
            raise ValueError("eval_images is what samples says here: use --samples")


FIRST = ("data", "samples", "out", "device", "target")

COMMAND = Command(AttentionCommand, "analyze_attention", first=FIRST)
