"""Pruning without training: score frozen weights, decide, and refit in closed form what is left."""

from __future__ import annotations

import copy
import resource
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from . import adapters
from .curvature import remaining_loss, watch
from .data import seed_draws
from .distill import frozen, sample_labels
from .progress import Progress, silent
from .refit import refit_
from .rotation import rotate_
from .saliency import RunningMean


def score(pruner, loader, *, progress: Progress = silent) -> None:
    """Add one pass over the data (or `score_batches`) to the pruner's saliency; weights stay as they are.

    Cross entropy with the labels, or with labels drawn from the model's own softmax. Criteria that read gates alone
    need no weight gradients: the weights are frozen meanwhile, which is faster and takes less memory.
    """
    config, model = pruner.config, pruner.model
    if pruner.criterion.reads == "nothing":
        pruner.observe({})
        return
    frozen_route = pruner.criterion.reads in ("gates", "either")
    trainable = {name: p.requires_grad for name, p in pruner.params.items()}
    device = next(model.parameters()).device
    model.eval()
    total = _batches(pruner, loader)
    adapter = adapters.find(model)
    try:
        for p in pruner.params.values():
            p.requires_grad_(not frozen_route)
        if frozen_route:
            pruner._record_gates()
        for done, (images, labels) in enumerate(islice(loader, total), start=1):
            seed_draws(config.seed, 2**31 + done)
            cls, dist = adapter.logits(model, images.to(device))
            logits = cls if dist is None else (cls + dist) / 2
            labels = labels.to(device) if config.labels == "true" else sample_labels(logits)
            loss = nn.functional.cross_entropy(logits, labels)
            if not bool(torch.isfinite(loss.detach())):
                raise FloatingPointError(f"the loss is {float(loss.detach())} on scoring batch {done}; check the data")
            loss.backward()
            pruner.observe()
            model.zero_grad(set_to_none=True)
            progress(done, total, "score")
    finally:
        pruner.stop_recording()
        for name, p in pruner.params.items():
            p.requires_grad_(trainable[name])


def _batches(pruner, loader) -> int:
    return min(pruner.config.score_batches or len(loader), len(loader))


class Refitter:
    """What a one-shot run keeps for closed-form refits.

    Attributes:
        dense: the model before anything left, in the basis it was rotated to.
        seen: of that model.
        seconds: spent here so far.
    """

    def __init__(self, pruner, loader, progress: Progress) -> None:
        self.pruner, self.loader, self.progress, self.seconds = pruner, loader, progress, 0.0
        start = time.monotonic()
        self.total = _batches(pruner, loader)
        pruner.model.eval()
        self.seen = self._watch()
        self.fresh = True
        self.dense = None
        if pruner.config.refit:
            rotate_(pruner.model, self.seen)
            self.dense = frozen(copy.deepcopy(pruner.model))
        self.seconds += time.monotonic() - start

    def _images(self) -> Iterator[Tensor]:
        return (images for images, _ in islice(self.loader, self.total))

    def _watch(self):
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
        self.seconds += time.monotonic() - start
        before, after = (sum(r[key] for r in rows) for key in ("before", "after"))
        return {
            "refit_seconds": time.monotonic() - start,
            "refit_error": after / before if before else 1.0,
            "peak_memory": peak_memory(next(pruner.model.parameters()).device),
        }


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held so far: on its GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prune_one_shot(pruner, loader, keep, progress: Progress) -> list:
    """A snapshot for each target: score, decide, refit, in `rounds` equal steps of latency from one to the next."""
    config = pruner.config
    refitter = Refitter(pruner, loader, progress) if config.refit or config.criterion == "remaining" else None
    snapshots = []
    for target in pruner.targets:
        start = pruner.ratio
        for r in range(1, config.rounds + 1):
            if config.criterion == "remaining":
                refitter.score()
            else:
                pruner.mean = RunningMean()
                score(pruner, loader, progress=progress)
            pruner.decide_at(start + (target - start) * r / config.rounds)
            if config.refit:
                pruner.history[-1] |= refitter.refit()
        snapshots.append(keep.take(pruner, target, pruner.compact()))
    return snapshots
