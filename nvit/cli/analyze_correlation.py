"""`nvit analyze correlation`: the paper's appendix B.5 for any model and any criteria."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from .. import adapters
from ..analysis import correlation
from ..config import CriterionName, PruneConfig, TaskName, _help, check_choices
from ..prune.pruner import prunable_groups
from ..spec import KINDS
from ..utils.progress import Progress
from ..utils.report import show, write_csv, write_result
from .command import Command
from .flags import DataFlags, Flat, MachineFlags, ModelFlags
from .inputs import open_images
from .models import open_model, untrained
from .progress import shown


@dataclass(frozen=True, kw_only=True)
class CorrelationCommand:
    """Saliency against the true loss change of removing a bundle, for some bundles of every group (App. B.5)."""

    task: TaskName = "auto"
    criterion: Annotated[tuple[CriterionName, ...], _help("saliencies to compare, on the same bundles and images")] = (
        "hessian",
        "abs",
    )
    bundles: Annotated[int, _help("bundles of every group, evenly over the ranks of each criterion")] = 8
    batches: Annotated[int, _help("batches of --data that are scored and on which the loss change is measured")] = 4
    batch_size: Annotated[int, _help("images a batch")] = 64
    labels: Annotated[Literal["true", "sampled"], _help("of the scores: the data's, or drawn from the model")] = "true"
    only: Annotated[tuple[str, ...], _help(f"kinds to look at, of {', '.join(KINDS)}; all if empty")] = ()
    seed: Annotated[int, _help("of the choice of images")] = 0
    out: Annotated[str, _help("folder for correlation.csv, correlation.png and result.json")] = "nvit-correlation"
    opening: Flat[ModelFlags] = field(default_factory=ModelFlags)
    machine: Flat[MachineFlags] = field(default_factory=MachineFlags)
    images: Flat[DataFlags] = field(default_factory=DataFlags)

    def check(self) -> None:
        """Raise ValueError where a value makes no sense."""
        check_choices(self)
        for name in ("bundles", "batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.criterion:
            raise ValueError("criterion is empty; give at least one, as hessian")
        self.scoring().check()

    def scoring(self) -> PruneConfig:
        """How its images are scored."""
        shared = {name: getattr(self, name) for name in ("task", "batch_size", "labels", "only", "seed")}
        return PruneConfig(train=False, **shared)


def run_correlation(name: str, command: CorrelationCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json."""
    start = time.monotonic()
    model = open_model(name, command.opening, command.machine.pick())
    config = command.scoring()
    witness = "never" if untrained(name, command.opening) else "always"
    loader = open_images(model, command.images, task=config.task, witness=witness).training(config, augment=False)
    batches = list(itertools.islice(loader, command.batches))
    groups = adapters.find(model).groups(model)
    free = prunable_groups(groups, config.only, config.freeze)
    scores = correlation.saliencies(model, batches, command.criterion, config, progress)
    bundles = correlation.propose(scores, free, command.bundles)
    changes = correlation.loss_changes(model, groups, bundles, batches, progress, task=config.task)
    rows = correlation.rows_of(bundles, scores, changes)
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "correlation.csv", rows)
    images = sum(len(labels) for _, labels in batches)
    correlation.plot(rows, command.criterion, out / "correlation.png", images)
    found = {
        "model": name,
        "correlations": correlation.rank_correlations(rows, command.criterion),
        "bundles": len(rows),
        "images": images,
        "csv": str(out / "correlation.csv"),
        "figure": str(out / "correlation.png"),
        "seconds": time.monotonic() - start,
    }
    write_result(out, found)
    return found


def run(command: CorrelationCommand, words: Sequence[str]) -> None:
    with command.machine.running(), shown() as progress:
        found = run_correlation(words[0], command, progress)
    rows = [{"name": f"{c['criterion']}, {c['kind']}"} | c for c in found["correlations"]]
    show(f"{words[0]}: {found['bundles']} bundles removed one by one, {found['images']} images", rows)
    print(f"{found['csv']}\n{found['figure']}")


COMMAND = Command(CorrelationCommand, "MODEL", run, 1, 1)
