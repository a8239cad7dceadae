"""`nvit analyze correlation`: the paper's appendix B.5 for any model and any criteria."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from .. import adapters
from ..analysis import correlation
from ..prune.pruner import prunable_groups
from ..utils.progress import Progress
from ..utils.report import show, write_csv, write_result
from ..utils.stages import Stage
from .flags.correlation import CorrelationCommand
from .inputs import open_images
from .models import open_model, untrained
from .progress import shown


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


def run(command: CorrelationCommand) -> None:
    with command.machine.running(), shown([Stage("score", 30), Stage("remove", 70)]) as progress:
        found = run_correlation(command.model, command, progress)
    rows = [{"name": f"{c['criterion']}, {c['kind']}"} | c for c in found["correlations"]]
    show(f"{command.model}: {found['bundles']} bundles removed one by one, {found['images']} images", rows)
    print(f"{found['csv']}\n{found['figure']}")
