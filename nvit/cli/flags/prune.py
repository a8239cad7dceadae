"""Flags of `nvit prune` and `nvit demo`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...config import PruneConfig, _help
from ...prune.states import states_in
from ..command import Command
from .parts import MODEL, BatchFlags, DataFlags, GeneralFlags, LatencyFlags, LogFlags, MachineFlags, ModelFlags

if TYPE_CHECKING:
    from torch import nn

    from ...latency.table import LatencyTable


@dataclass(frozen=True, kw_only=True)
class PruneCommand:
    """Prune a vision transformer to a latency target."""

    model: Annotated[str, MODEL] = ""
    out: Annotated[str, _help("folder for snapshots, table, history and result.json")] = "nvit-run"
    resume: Annotated[bool, _help("go on where an interrupted run in --out stopped")] = False
    dry_run: Annotated[bool, _help("print what the run would take, from a few timed batches, and write nothing")] = (
        False
    )
    latency_ms: Annotated[tuple[float, ...], _help("targets in ms a batch of --latency-batch images")] = ()
    images_per_second: Annotated[tuple[float, ...], _help("targets as throughput at that batch")] = ()
    opening: ModelFlags = field(default_factory=ModelFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)
    batch: BatchFlags = field(default_factory=BatchFlags)
    where: DataFlags = field(default_factory=DataFlags)
    latency: LatencyFlags = field(default_factory=LatencyFlags)
    config: PruneConfig = field(default_factory=PruneConfig)
    logging: LogFlags = field(default_factory=LogFlags)
    general: GeneralFlags = field(default_factory=GeneralFlags)

    def check(self) -> None:
        """Raise ValueError where a value makes no sense."""
        self.config.check()
        for name in ("latency_ms", "images_per_second"):
            for value in getattr(self, name):
                if not 0 < value < math.inf:
                    raise ValueError(f"{name} {value:g} is not a positive number")
            if getattr(self, name) and self.config.sweep:
                raise ValueError(f"{name} and sweep both say the targets; give one of them")
            if getattr(self, name) and self.config.latency_target != PruneConfig().latency_target:
                raise ValueError(f"{name} stands in place of latency_target; give one of them")

    def states(self) -> list[Path]:
        """What `--resume` would go on from."""
        return states_in(Path(self.out))

    def with_targets(self, model: nn.Module, table: LatencyTable) -> PruneConfig:
        """The config, with `latency_target` in fractions where it was asked for in ms or images per second.

        Raises:
            ValueError: the dense model meets a target already, or no pruning does.
        """
        from ...prune.targets import fractions, refuse_out_of_reach

        if not self.latency_ms and not self.images_per_second:
            refuse_out_of_reach(model, table, self.config)
            return self.config
        found = fractions(model, table, self.config, self.latency_ms, self.images_per_second)
        return dataclasses.replace(self.config, latency_target=found)


FIRST = (
    "data",
    "latency_target",
    "out",
    "train",
    "refit",
    "finetune_epochs",
    "batch_size",
    "eval_data",
    "checkpoint",
    "dry_run",
    "device",
    "resume",
)
"""What most people need."""

APART = (("sweep", "latency_target"),)

COMMAND = Command(PruneCommand, "prune", first=FIRST, ranks=True, apart=APART)

DEMO = Command(
    PruneCommand,
    "prune",
    first=("latency_target", "sweep", "out", "train", "refit", "finetune_epochs", "device", "resume"),
    ranks=True,
    apart=APART,
    demo=Path(__file__).parents[2] / "bundled" / "digits.toml",
)
