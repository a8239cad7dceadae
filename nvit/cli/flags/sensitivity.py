"""Flags of `nvit analyze sensitivity`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...config import PruneConfig, TaskName, _help
from ...utils.settings import check_at_least_one, check_choices
from ..command import Command
from .parts import MODEL, DataFlags, GeneralFlags, LatencyFlags, MachineFlags, ModelFlags


@dataclass(frozen=True, kw_only=True)
class SensitivityCommand:
    """Mean Hessian trace of Q, K, V, proj, FC1, FC2, and their latency (Tab. 5)."""

    model: Annotated[str, MODEL] = ""
    task: TaskName = "auto"
    samples: Annotated[int, _help("images of --data that the loss is of")] = 512
    batch_size: Annotated[int, _help("images at once: memory, and how many estimates a standard error is of")] = 16
    probes: Annotated[int, _help("random vectors a batch, for the Hessian; its standard error needs many")] = 2
    seed: Annotated[int, _help("of the choice of images and of the vectors")] = 0
    out: Annotated[str, _help("folder for sensitivity.csv, sensitivity.png and result.json")] = "nvit-sensitivity"
    opening: ModelFlags = field(default_factory=ModelFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)
    images: DataFlags = field(default_factory=DataFlags)
    latency: LatencyFlags = field(default_factory=lambda: LatencyFlags(table="analytic"))
    general: GeneralFlags = field(default_factory=GeneralFlags)

    def check(self) -> None:
        """Raise ValueError where a value makes no sense."""
        check_choices(self)
        check_at_least_one(self, "samples", "batch_size", "probes")
        if self.samples < 2 * self.batch_size:
            raise ValueError(
                f"samples is {self.samples}; a standard error needs two batches, {2 * self.batch_size} images, or a "
                "smaller --batch-size"
            )
        self.reading().check()

    def reading(self) -> PruneConfig:
        """How its images are read."""
        return PruneConfig(train=False, task=self.task, batch_size=self.batch_size, seed=self.seed)


FIRST = ("data", "samples", "probes", "table", "out", "device")

COMMAND = Command(SensitivityCommand, "analyze_sensitivity", first=FIRST)
