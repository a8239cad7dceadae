"""Flags of `nvit analyze correlation`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ...config import CriterionName, KindName, PruneConfig, TaskName, _help
from ...utils.settings import check_at_least_one, check_choices
from ..command import Command
from .parts import MODEL, DataFlags, GeneralFlags, MachineFlags, ModelFlags


@dataclass(frozen=True, kw_only=True)
class CorrelationCommand:
    """Saliency against the true loss change of removing bundles (App. B.5)."""

    model: Annotated[str, MODEL] = ""
    task: TaskName = "auto"
    criterion: Annotated[tuple[CriterionName, ...], _help("saliencies to compare, on the same bundles and images")] = (
        "hessian",
        "abs",
    )
    bundles: Annotated[int, _help("bundles of every group, evenly over the ranks of each criterion")] = 8
    batches: Annotated[int, _help("batches of --data that are scored and on which the loss change is measured")] = 4
    batch_size: Annotated[int, _help("images a batch")] = 64
    labels: Annotated[Literal["true", "sampled"], _help("of the scores: the data's, or drawn from the model")] = "true"
    only: Annotated[tuple[KindName, ...], _help("kinds to look at; all if empty")] = ()
    seed: Annotated[int, _help("of the choice of images")] = 0
    out: Annotated[str, _help("folder for correlation.csv, correlation.png and result.json")] = "nvit-correlation"
    opening: ModelFlags = field(default_factory=ModelFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)
    images: DataFlags = field(default_factory=DataFlags)
    general: GeneralFlags = field(default_factory=GeneralFlags)

    def check(self) -> None:
        """Raise ValueError where a value makes no sense."""
        check_choices(self)
        check_at_least_one(self, "bundles", "batches", "batch_size")
        if not self.criterion:
            raise ValueError("criterion is empty; give at least one, as hessian")
        self.scoring().check()

    def scoring(self) -> PruneConfig:
        """How its images are scored."""
        shared = {name: getattr(self, name) for name in ("task", "batch_size", "labels", "only", "seed")}
        return PruneConfig(train=False, **shared)


FIRST = ("data", "criterion", "bundles", "batches", "only", "out", "device")

COMMAND = Command(CorrelationCommand, "analyze_correlation", first=FIRST)
