"""Pruning without training: score frozen weights, decide, and refit in closed form what is left."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..calibration.capture import Place
from ..calibration.coarse import coarser
from ..calibration.statistics import SiteStatistics, gather_statistics
from ..refit.costs import DEPTHS, SHALLOW, measure_costs
from ..refit.judge import Judge
from ..refit.refit import refit_
from ..refit.rotation import rotate_
from ..selection.curves import Curve
from ..structure.masks import Masks
from ..training.batches import images_of
from ..training.distill import frozen
from ..utils.logs import Log, unlogged
from ..utils.memory import most_held
from ..utils.progress import Progress
from . import between
from .budget import Budget
from .prices import compares
from .pruner import Pruner
from .sample import count_batches, sampled
from .scoring import score

COARSE_MERGED = 0.5
"""The share of images that a refit sees through fewer pixels where tokens merge and nothing is said: it is nearer to
the dense model then, also on sharp images (docs/tokens.md)."""


def prune_one_shot(
    pruner: Pruner, loader, keep, budget: Budget | None, progress: Progress, log: Log = unlogged
) -> list:
    """A snapshot for each target: score, decide, refit, in `rounds` equal steps of latency from one to the next.
    A sweep scores the dense model alone, and every target is chosen by that."""
    config = pruner.config
    pruner.stop_recording()
    steps = Steps(pruner, loader, budget, progress, log)
    snapshots = between.go_on(pruner, keep)
    for target in pruner.targets[len(snapshots) :]:
        start = pruner.ratio
        for r in range(1, config.rounds + 1):
            last = r == config.rounds
            steps.to(target if last else start + (pruner.aim.at(target) - start) * r / config.rounds)
        snapshots.append(keep.take(pruner, target, pruner.compact()))
        if budget is None:  # which has no room for what writing a state takes
            between.keep(pruner, keep)
    return snapshots


class Steps:
    """Steps of a one-shot run, each to a latency: score, decide, refit. The model is still dense when this is made."""

    def __init__(self, pruner: Pruner, loader, budget: Budget | None, progress: Progress, log: Log) -> None:
        self.pruner, self.loader, self.budget, self.progress, self.log = pruner, loader, budget, progress, log
        self.refitter = Refitter(pruner, loader, progress) if pruner.config.refit else None

    def to(self, ratio: float) -> None:
        """Down to a predicted latency, as a fraction of dense."""
        pruner, config, refitter = self.pruner, self.pruner.config, self.refitter
        known = refitter.statistics if refitter is not None and pruner.ratio == 1.0 else None
        if not (config.sweep and pruner.known_scores):
            score(pruner, self.loader, self.budget, statistics=known, progress=self.progress)
        judge = refitter.distance if refitter is not None and compares(config) else None
        pruner.decide_at(ratio, refitter.costs if config.measures_costs else None, judge)
        if refitter is not None:
            pruner.history[-1] |= refitter.refit()
        error = {k: v for k, v in pruner.history[-1].items() if k == "refit_error"}
        self.log("prune", len(pruner.history), {"ratio": pruner.ratio} | pruner.mean_widths() | error)


class Refitter:
    """Refits of a one-shot run, from calibration images alone.

    Attributes:
        statistics: of the dense model in the basis it is rotated to, before anything has left.
        dense: that model.
        cost_seconds: that measuring costs has taken.
        judge: of two choices, once it is asked.
    """

    def __init__(self, pruner: Pruner, loader, progress: Progress) -> None:
        self.pruner, self.loader, self.progress = pruner, loader, progress
        self.cost_seconds = 0.0
        self.judge: Judge | None = None
        self.total = count_batches(loader, pruner.config)
        pruner.model.eval()
        self.statistics: Mapping[Place, SiteStatistics] = gather_statistics(
            pruner.model, self._images(), task=pruner.task, seed=pruner.config.seed, total=self.total, progress=progress
        )
        rotate_(pruner.model, self.statistics)
        self.dense = frozen(copy.deepcopy(pruner.model))

    def _images(self) -> Iterator[Tensor]:
        return images_of(sampled(self.loader, self.pruner.config))

    def costs(self, scores: Mapping[str, Tensor]) -> dict[str, Curve]:
        """What the first units of every group cost, measured on the dense model; see `measure_costs`."""
        start = time.monotonic()
        curves = measure_costs(
            self.dense,
            self.pruner.groups,
            scores,
            self._images(),
            task=self.pruner.task,
            statistics=self.statistics,
            shares=SHALLOW if self.pruner.config.merges_tokens else DEPTHS,
            depth=self.pruner.config.depth,
            progress=self.progress,
        )
        self.cost_seconds = time.monotonic() - start
        return curves

    def distance(self, masks: Masks) -> float:
        """How far the dense model is from itself once cut by masks and refitted; see `Judge`."""
        if self.judge is None:
            self.judge = Judge(self.dense, self.pruner.groups, self.pruner.task, statistics=self.statistics)
            for images in self._images():
                self.judge.take(images)
            self.judge.ready()
        return float(self.judge.of(masks))

    def refit(self) -> dict[str, Any]:
        """Refit what the last decision left, and return time and memory of it for the history."""
        start = time.monotonic()
        model, groups = self.pruner.model, self.pruner.groups
        config, images = self.pruner.config, self._images()
        share = config.coarse if config.coarse >= 0 else COARSE_MERGED * config.merges_tokens
        if share:
            images = coarser(images, share, config.seed)
        rows = refit_(model, self.dense, groups, images, statistics=self.statistics, progress=self.progress)
        before = sum(row["before"] for row in rows)
        after = sum(row["after"] for row in rows)
        return {
            "refit_seconds": time.monotonic() - start,
            "cost_seconds": self.cost_seconds,
            "refit_error": after / before if before else 1.0,
            "peak_memory": most_held(next(model.parameters()).device),
        }
