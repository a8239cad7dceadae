"""Pruning without training: score frozen weights, decide, and refit in closed form what is left."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from ..calibration.statistics import GateProducts, Place, Seen, watch
from ..config import WATCHED
from ..criteria.base import RunningMean
from ..criteria.curvature import curvature_loss
from ..criteria.remaining import remaining_loss
from ..refit.refit import refit_
from ..refit.rotation import rotate_
from ..training.distill import frozen
from ..utils.memory import most_held
from ..utils.progress import Progress
from .budget import Budget
from .pruner import Pruner
from .scoring import batches_to_score, score


class Watcher:
    """Scores and refits of a one-shot run that are read from activations and their gradients.

    Attributes:
        dense: the model before anything left, in the basis it was rotated to; None where nothing is refitted.
        seen: of that model, see `curvature.watch`.
    """

    def __init__(self, pruner: Pruner, loader, progress: Progress) -> None:
        self.pruner, self.loader, self.progress = pruner, loader, progress
        self.total = batches_to_score(pruner, loader)
        self.dense = self.seen = None
        pruner.model.eval()
        if pruner.config.refit:
            self.seen = self._watch()
            rotate_(pruner.model, self.seen)
            self.dense = frozen(copy.deepcopy(pruner.model))

    def _images(self) -> Iterator[Tensor]:
        return (images for images, _ in islice(self.loader, self.total))

    def _watch(self, gates: GateProducts | None = None) -> dict[Place, Seen]:
        pruner = self.pruner
        return watch(
            pruner.model, self._images(), gates=gates, seed=pruner.config.seed, total=self.total, progress=self.progress
        )

    def score(self) -> None:
        """Set the pruner's saliency to what the criterion says of the model as it is."""
        pruner = self.pruner
        where = (pruner.model, pruner.free, pruner.masks)
        if pruner.config.saliency == "curvature":
            gates = GateProducts()
            scores = curvature_loss(*where, self._watch(gates), gates)
        else:
            # What was seen of the rotated model says all while nothing has left it.
            whole = self.seen is not None and not pruner.history
            scores = remaining_loss(*where, self.seen if whole else self._watch())
        pruner.mean = RunningMean()
        pruner.mean.update(scores)

    def refit(self) -> dict[str, Any]:
        """Refit what the last decision left, and return time and memory of it for the history."""
        start = time.monotonic()
        pruner = self.pruner
        rows = refit_(pruner.model, self.dense, pruner.groups, self._images(), seen=self.seen, progress=self.progress)
        before, after = (sum(r[key] for r in rows) for key in ("before", "after"))
        return {
            "refit_seconds": time.monotonic() - start,
            "refit_error": after / before if before else 1.0,
            "peak_memory": most_held(next(pruner.model.parameters()).device),
        }


def prune_one_shot(pruner: Pruner, loader, keep, budget: Budget | None, progress: Progress) -> list:
    """A snapshot for each target: score, decide, refit, in `rounds` equal steps of latency from one to the next."""
    config, watched = pruner.config, pruner.config.saliency in WATCHED
    watcher = Watcher(pruner, loader, progress) if config.refit or watched else None
    snapshots = []
    for target in pruner.targets:
        start = pruner.ratio
        for r in range(1, config.rounds + 1):
            if watched:
                watcher.score()
            else:
                pruner.mean = RunningMean()
                score(pruner, loader, budget, progress=progress)
            pruner.decide_at(start + (target - start) * r / config.rounds)
            if config.refit:
                pruner.history[-1] |= watcher.refit()
        snapshots.append(keep.take(pruner, target, pruner.compact()))
    return snapshots
