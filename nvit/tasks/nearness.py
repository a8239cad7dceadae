"""How far answers are from the dense model's, on images that are kept for that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters.base import Logits
from ..structure.verify import evaluating
from ..utils.devices import portions, sent
from .base import Task


class Nearness:
    """The task's own distance to the dense model at temperature 1, a mean over images: of classifiers the KL of the
    softmaxes, in nats an image.

    Attributes:
        batches: the images, as many at once as the device takes best.
        dense: the dense model's answers, by batch.

    Raises:
        ValueError: there are no images.
    """

    def __init__(self, task: Task, dense: nn.Module, batches: Sequence[Tensor]) -> None:
        device = next(dense.parameters()).device
        self.task, self.batches = task, [x for batch in batches for x in portions(batch, device)]
        self.images = sum(map(len, batches))
        if not self.images:
            raise ValueError("how near answers stay is measured on images of its own, and there are none; give more")
        self.dense = list(self._answers(dense))

    def _answers(self, model: nn.Module) -> Iterable[Logits]:
        adapter, device = adapters.find(model), next(model.parameters()).device
        with torch.no_grad(), evaluating(model):
            return [adapter.logits(model, sent(x, device)) for x in self.batches]

    def of(self, model: nn.Module) -> float:
        """Of a model of the dense one's outputs."""
        return float(self.mean(self._answers(model)))

    def mean(self, answers: Iterable[Logits]) -> Tensor:
        """Of answers to all images, by batch; a scalar where they are."""
        return sum(self.total(b, ours) for b, ours in enumerate(answers)) / self.images

    def total(self, batch: int, answers: Logits) -> Tensor:
        """Of answers to the images of one batch, summed over these."""
        dense = self.dense[batch]
        return self.task.distance(answers, dense, 1.0) * len(dense.cls)
