"""Pruning without training: score frozen weights, decide, and refit in closed form what is left."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from .budget import Budget
from .curvature import Place, Seen, remaining_loss, watch
from .distill import frozen
from .memory import most_held
from .progress import Progress
from .pruner import Pruner
from .refit import refit_
from .rotation import rotate_
from .saliency import RunningMean
from .scoring import batches_to_score, score


class Refitter:
    """What a one-shot run keeps for closed-form refits.

    Attributes:
        dense: the model before anything left, in the basis it was rotated to; None where nothing is refitted.
        seen: of that model, see `curvature.watch`.
    """

    def __init__(self, pruner: Pruner, loader, progress: Progress) -> None:
        self.pruner, self.loader, self.progress = pruner, loader, progress
        self.total = batches_to_score(pruner, loader)
        pruner.model.eval()
        self.seen = self._watch()
        self.fresh = True
        self.dense = None
        if pruner.config.refit:
            rotate_(pruner.model, self.seen)
            self.dense = frozen(copy.deepcopy(pruner.model))

    def _images(self) -> Iterator[Tensor]:
        return (images for images, _ in islice(self.loader, self.total))

    def _watch(self) -> dict[Place, Seen]:
        return watch(
            self.pruner.model, self._images(), seed=self.pruner.config.seed, total=self.total, progress=self.progress
        )

    def score(self) -> None:
        """Set the pruner's saliency to the loss that remains after a refit."""
        pruner = self.pruner
        seen = self.seen if self.fresh else self._watch()
        self.fresh = False
        pruner.mean = RunningMean()
        pruner.mean.update(remaining_loss(pruner.model, pruner.free, pruner.masks, seen))

    def refit(self) -> dict[str, Any]:
        """Refit what the last decision left; time and memory of it for the history."""
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
    config, remaining = pruner.config, pruner.config.saliency == "remaining"
    refitter = Refitter(pruner, loader, progress) if config.refit or remaining else None
    snapshots = []
    for target in pruner.targets:
        start = pruner.ratio
        for r in range(1, config.rounds + 1):
            if remaining:
                refitter.score()
            else:
                pruner.mean = RunningMean()
                score(pruner, loader, budget, progress=progress)
            pruner.decide_at(start + (target - start) * r / config.rounds)
            if config.refit:
                pruner.history[-1] |= refitter.refit()
        snapshots.append(keep.take(pruner, target, pruner.compact()))
    return snapshots
